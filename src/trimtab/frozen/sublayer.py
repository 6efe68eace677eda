"""A sub-layer without a weight of its own (a dropout, an MLP, an attention): only its output can be edited."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.errors import TargetError
from trimtab.frozen.layer import Layer, Push


class SubLayer(Layer):
    """Made where no weighted kind describes the module. ``width`` is that of its output; where the module has
    no parameters, those of ``around`` (a module that encloses it) tell device and dtype.
    """

    kind = "sublayer"

    def __init__(self, module: nn.Module, width: int, around: nn.Module | None = None) -> None:
        self.module = module
        self.around = module if around is None else around
        self.in_features = self.out_features = width

    @classmethod
    def view(cls, module: nn.Module) -> SubLayer | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        first = self._parameter()
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def device(self) -> torch.device:
        first = self._parameter()
        return torch.device("cpu") if first is None else first.device

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """As for any layer; but pictures have a dtype of their own, which is not that of the hidden states."""
        return self.dtype if x.dim() > 3 else super().compute_dtype(x)

    def _parameter(self) -> Tensor | None:
        first = next(self.module.parameters(), None)
        return next(self.around.parameters(), None) if first is None else first

    def call(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def bias(self) -> Tensor | None:
        return None

    def dense(self) -> Tensor:
        raise self._no_weight()

    @property
    def shape(self) -> tuple[int, ...]:
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
