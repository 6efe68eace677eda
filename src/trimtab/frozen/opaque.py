"""The universal rule: any module that says ``in_features`` and ``out_features`` is a linear map.

Its weight may be hidden in any format (that of GPTQ, AWQ, torchao, …); the dense weight is what comes out when the
identity goes in.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trimtab.frozen.linear import LinearMap, hidden
from trimtab.frozen.lowbit import untrained


class OpaqueLinear(LinearMap):
    """A linear layer of unknown storage, used through its forward alone."""

    rounded = True

    def __init__(self, module: nn.Module, in_features: int, out_features: int) -> None:
        self.module = module
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def view(cls, module: nn.Module) -> OpaqueLinear | None:
        sizes = (module.__dict__.get("in_features"), module.__dict__.get("out_features"))
        return cls(module, *sizes) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """That of a plain or torchao's weight; codes say nothing of what is computed in, and scales little, so else
        that of the model."""
        weight = self.module._parameters.get("weight")
        around = [] if self.root is None else self.root.parameters()
        for tensor in (*([] if weight is None else [weight]), *around, *self._tensors()):
            if tensor.is_floating_point() and tensor.element_size() > 1:
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        tensors = self._tensors()
        return tensors[0].device if tensors else torch.device("cpu")

    @torch.no_grad()
    def dense(self) -> Tensor:
        eye = torch.eye(self.in_features, dtype=self.dtype, device=self.device)
        y: Tensor = self.call(eye) - self.call(torch.zeros_like(eye[:1]))
        return y.T

    @torch.no_grad()
    def bias(self) -> Tensor | None:
        zero = torch.zeros(1, self.in_features, dtype=self.dtype, device=self.device)
        bias = self.call(zero)[0]
        return bias if bool(bias.any()) else None

    def stored(self) -> dict[str, Tensor]:
        found = super().stored()
        weight = found.get("weight")
        if weight is None or hidden(weight) or not weight.is_floating_point():
            raise untrained(self.module)
        return found

    def holding(self) -> Iterable[Tensor]:
        return self._tensors()

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]
