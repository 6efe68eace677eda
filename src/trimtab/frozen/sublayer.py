"""A sub-layer without a weight of its own (a dropout, an MLP, an attention): only its output can be edited."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.errors import TargetError
from trimtab.frozen.layer import Layer, Push


class SubLayer(Layer):
    """``width`` is that of its output; made where no weighted kind describes the module."""

    kind = "sublayer"

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module = module
        self.in_features = self.out_features = width

    @classmethod
    def view(cls, module: nn.Module) -> SubLayer | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        first = next(self.module.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def device(self) -> torch.device:
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def call(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def bias(self) -> Tensor | None:
        return None

    def dense(self) -> Tensor:
        raise self._no_weight()

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        raise self._no_weight()

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        raise self._no_weight()

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        raise self._no_weight()

    def probe(self, push: Push) -> tuple[Tensor, Tensor | None]:
        raise self._no_weight()

    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        raise self._no_weight()

    def _no_weight(self) -> TargetError:
        return TargetError(
            f"{type(self.module).__name__} is not a layer with a weight that Trimtab knows (linear, embedding, "
            "convolution, norm); target the layers inside it."
        )
