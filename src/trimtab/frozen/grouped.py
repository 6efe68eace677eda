"""Weights that arrive in groups with a scale each (`trimtab.kernels.grouped`): GPTQ, AWQ, compressed-tensors, GGUF."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.grouped import Grouped, dequantised


class GroupedLinear(LowBitLinear):
    """A linear layer with a weight in groups. ``kind`` is the name of what stored it so."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(self, kind: str, weight: Grouped, bias: Tensor | None, dtype: torch.dtype) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, dtype)
        self.kind = kind
        self._bits, self._zero = weight.bits, weight.zero
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("order", weight.order)
        self._hold(bias)

    @property
    def grouped(self) -> Grouped:
        """The stored weight."""
        return Grouped(self.codes, self._bits, self.scales, self.zeros, self._zero, self.order)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantised(self.grouped, dtype)
