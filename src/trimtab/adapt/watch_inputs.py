"""Watching what goes into the layers of a bare model, for `trimtab.adapt.observe`.

Positions that are padding, or whose label does not count, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.context import IGNORED
from trimtab.adapt.observed import Covariance, Inputs, Observed, unseen
from trimtab.adapt.pca import Components, Covariances
from trimtab.errors import UnsupportedError
from trimtab.frozen import Layer
from trimtab.frozen.experts import run
from trimtab.models.anatomy import Anatomy


class InputWatch:
    """Principal components, or covariances, of what goes into layers. Layers that are given one tensor share them."""

    def __init__(self, anatomy: Anatomy, wants: Mapping[str, Any]) -> None:
        self.anatomy = anatomy
        self.batch: Any = None
        self.wants: Mapping[str, tuple[Sequence[Layer], Inputs | Covariance]] = wants
        self._components: dict[tuple[str, int], Components | Covariances] = {}
        self._leader: dict[str, str] = {}
        self._given_tokens: set[str] = set()
        self._newest: tuple[str, Tensor] | None = None
        for layers, _ in wants.values():
            for layer in layers:
                _check_kind(layer)

    @property
    def settled(self) -> bool:
        return all(one.settled for one in self._components.values())

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for path, (layers, _) in self.wants.items():
                where = self.anatomy.parameters.get(path, path)
                experts = path in self.anatomy.experts
                hook = self._experts(path) if experts else self._layer(path, layers[0])
                module = self.anatomy.modules[where]
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> dict[str, list[Observed]]:
        found: dict[str, list[Observed]] = {}
        for path, (layers, _) in self.wants.items():
            ones = [
                self._components.get((self._leader.get(path, path), expert))
                for expert in range(len(layers))
            ]
            if None in ones:
                raise unseen(path, len(ones), ones.index(None))
            found[path] = [one.found() for one in ones if one is not None]
        return found

    def _layer(self, path: str, layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            if path not in self._leader:
                self._leader[path] = self._sharing(path, x)
            if self._leader[path] == path:
                self._newest = path, x
                self._see(path, 0, self._visible(path, x, layer))

        return hook

    def _sharing(self, path: str, x: Tensor) -> str:
        """The layer that was given this very tensor just before, and is asked the same; else this one."""
        if self._newest is not None:
            leader, newest = self._newest
            if newest is x and self.wants[leader][1] == self.wants[path][1]:
                return leader
        return path

    def _experts(self, path: str) -> Callable[..., None]:
        name = path.rpartition(".")[2]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = (*args, *kwargs.values())[:3]
            visible = self._mask(path, hidden)

            def around(parameter: str, expert: int, layer: Layer, x: Tensor, n: Tensor) -> Tensor:
                if parameter == name:
                    self._see(path, expert, x if visible is None else x[visible[n]])
                return layer.call(x)

            run(module, hidden, index, weights, around)

        return hook

    def _see(self, path: str, expert: int, x_NI: Tensor) -> None:
        if (path, expert) not in self._components:
            want = self.wants[path][1]
            self._components[path, expert] = (
                Components(want.directions, want.alike)
                if isinstance(want, Inputs)
                else Covariances()
            )
        one = self._components[path, expert]
        if not one.settled:
            one.see(x_NI)

    def _visible(self, path: str, x: Tensor, layer: Layer) -> Tensor:
        """The rows of a layer's input that are no padding, and whose label counts."""
        if layer.kind == "conv":
            return _patches(x, layer)
        mask = self._mask(path, x)
        flat = x.reshape(-1, x.shape[-1])
        return flat if mask is None else flat[mask]

    def _mask(self, path: str, x: Tensor) -> Tensor | None:
        """True at the positions of x (flattened) that count; None is all."""
        masks = self._masks(path)
        positions = x[..., 0].numel()
        fitting = [mask.flatten() for mask in masks if mask.numel() == positions]
        if fitting:
            self._given_tokens.add(path)
            return torch.stack(fitting).all(0).to(x.device)
        if (
            path in self._given_tokens
        ):  # what else it is given (relative positions) is not of the data
            return torch.zeros(positions, dtype=torch.bool, device=x.device)
        if any(positions != mask.shape[0] and not bool(mask.all()) for mask in masks):
            raise UnsupportedError(
                f"{path} is given {positions} positions, and the batch's masks tell of {masks[0].numel()}: it cannot "
                "be told which are padding. Leave it out of the targets."
            )
        return None

    def _masks(self, path: str) -> list[Tensor]:
        """The (B, T) masks of the tokens that a layer sees: of padding, and of labels that count."""
        if not isinstance(self.batch, Mapping):
            return []
        batch, anatomy = self.batch, self.anatomy
        labels = batch.get("labels")
        counts = None if labels is None or labels.dim() != 2 else labels != IGNORED
        found = [batch.get("attention_mask"), counts]
        if anatomy.encoder_decoder:
            across = path in self._keys and any(name in path for name in _ACROSS)
            if ".decoder." in f".{path}." and not across:
                found = [batch.get("decoder_attention_mask"), counts]
            else:
                found = [batch.get("attention_mask")]
        return [mask.bool() for mask in found if mask is not None and mask.dim() == 2]

    @cached_property
    def _keys(self) -> set[str]:
        """The layers that make keys and values."""
        return {*self.anatomy.role("keys"), *self.anatomy.role("values")}


_ACROSS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
"""What cross-attention is called, whose keys and values are of the encoder's tokens."""


def _patches(x: Tensor, layer: Layer) -> Tensor:
    """Every patch that a convolution multiplies with its kernel, as rows."""
    rest = layer.matrix_shape()[1]
    eye = torch.eye(rest, dtype=x.dtype, device=x.device).reshape(rest, *layer.shape[1:])
    return layer.apply(x, eye).movedim(1, -1).reshape(-1, rest)


def _check_kind(layer: Layer) -> None:
    if layer.kind == "embedding":
        raise UnsupportedError(
            "the inputs of an embedding are token ids: their principal directions are single tokens, the most "
            "frequent first. Leave embeddings out of the targets of init eva and init corda."
        )
    if layer.kind == "conv" and layer.shape[1] != layer.in_features:
        raise UnsupportedError(
            "each group of a grouped convolution sees inputs of its own, and init eva and init corda find one set of "
            "directions for a layer. Leave grouped convolutions out of its targets."
        )
