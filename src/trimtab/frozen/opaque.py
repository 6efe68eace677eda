"""The universal rule: any module that says ``in_features`` and ``out_features`` is a linear map.

Its weight may be hidden in any format; the dense weight is what comes out when the identity goes in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.frozen.linear import LinearMap


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
        floating = [t.dtype for t in self._tensors() if t.is_floating_point()]
        return floating[0] if floating else torch.get_default_dtype()

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

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]
