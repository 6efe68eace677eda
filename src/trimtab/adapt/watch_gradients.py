"""Summing the gradients of a bare model's weights, for `trimtab.adapt.observe`.

The weights themselves take none: aliases that share their storage stand in their places for the while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.observed import Gradients, Observed, unseen
from trimtab.errors import DataError, UnsupportedError
from trimtab.frozen import Layer
from trimtab.models.anatomy import Anatomy


class GradientSums:
    """Sums of the gradients of weights, or of their squares, in canonical orientation."""

    def __init__(self, anatomy: Anatomy, wants: Mapping[str, Any]) -> None:
        self.anatomy = anatomy
        self.wants: Mapping[str, tuple[Sequence[Layer], Gradients]] = wants
        self.squared = any(want.squared for _, want in self.wants.values())
        self._sums: dict[str, Tensor] = {}
        self._aliases: dict[str, nn.Parameter] = {}
        self._count = 0

    @contextmanager
    def aliased(self) -> Iterator[None]:
        """Each weight replaced by an alias of its own that takes gradients; tied weights part for the while."""
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for path in self.wants:
                where = self.anatomy.parameters.get(path)
                name = path.rpartition(".")[2] if where is not None else "weight"
                module = self.anatomy.modules[path if where is None else where]
                weight = module._parameters.get(name)
                if weight is None or not weight.is_floating_point():
                    raise UnsupportedError(
                        f"{path}: gradients of a weight need one that is stored densely, and this one is not."
                    )
                alias = nn.Parameter(weight.detach())
                alias.register_post_accumulate_grad_hook(self._taker(path))
                replaced.append((module, name, weight))
                module._parameters[name] = self._aliases[path] = alias
            yield
        finally:
            for module, name, weight in replaced:
                module._parameters[name] = weight

    def add(self, out: Any) -> None:
        """The gradients of one loss."""
        loss = out if isinstance(out, Tensor) else getattr(out, "loss", None)
        if loss is None or loss.numel() != 1 or not loss.requires_grad:
            raise DataError(
                "a batch gave no loss to take gradients of: pass labels with it (or let the model return a scalar)."
            )
        if not bool(loss.isfinite()):
            raise DataError(
                "the loss of a batch is not a number: an example in it has no label that counts."
            )
        self._count += 1
        loss.backward(inputs=list(self._aliases.values()))

    def found(self) -> dict[str, list[Observed]]:
        found: dict[str, list[Observed]] = {}
        for path, (layers, _) in self.wants.items():
            if path not in self._sums:
                raise unseen(path, 1, 0)
            mean = self._sums[path] / self._count
            count = torch.tensor(self._count)
            if path not in self.anatomy.experts:
                found[path] = [{"gradient": layers[0].orient(mean), "count": count}]
                continue
            turned = vars(self.anatomy.modules[self.anatomy.experts[path]])["is_transposed"]
            found[path] = [{"gradient": one.T if turned else one, "count": count} for one in mean]
        return found

    def _taker(self, path: str) -> Callable[[Tensor], None]:
        def take(alias: Tensor) -> None:
            if alias.grad is None:
                return
            new = alias.grad.float().cpu()
            new = new.square() if self.wants[path][1].squared else new
            self._sums[path] = self._sums[path] + new if path in self._sums else new
            alias.grad = None

        return take
