"""NF4 and FP4 weights, as QLoRA stores them (`trimtab.kernels.fourbit`)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from trimtab.frozen.lowbit import LowBitLinear, check_weight
from trimtab.kernels.fourbit import BLOCK, FourBit, Kind, dequantise, quantise


class FourBitLinear(LowBitLinear):
    """A linear layer in four bits; made of a dense weight by `of`, or of stored codes by `holding`."""

    codes: Tensor
    scales: Tensor
    outer: Tensor | None
    mean: Tensor | None

    def __init__(self, packed: FourBit, bias: Tensor | None, dtype: torch.dtype) -> None:
        out_features, in_features = packed.shape
        super().__init__(in_features, out_features, dtype)
        self.kind, self.block = packed.kind, packed.block
        for name in ("codes", "scales", "outer", "mean"):
            self.register_buffer(name, getattr(packed, name))
        self._hold(bias)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        kind: Kind = "nf4",
        *,
        block: int = BLOCK,
        nested: bool = True,
    ) -> FourBitLinear:
        """Round a dense layer."""
        check_weight(weight)
        return cls(quantise(weight, kind, block=block, nested=nested), bias, weight.dtype)

    @property
    def packed(self) -> FourBit:
        """The stored weight."""
        shape = (self.out_features, self.in_features)
        return FourBit(self.kind, shape, self.codes, self.scales, self.outer, self.mean, self.block)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self.packed, dtype)

    def like(self, weight: Tensor, bias: Tensor | None) -> FourBitLinear:
        nested = self.outer is not None
        kind = cast(Kind, self.kind)
        return FourBitLinear.of(weight, bias, kind, block=self.block, nested=nested)
