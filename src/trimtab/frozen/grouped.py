"""Weights that arrive in groups with a scale each (`trimtab.kernels.grouped`): GPTQ, AWQ, compressed-tensors, GGUF."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.frozen.affine import AffineLinear
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.affine import constant_in_groups
from trimtab.kernels.grouped import Grouped, dequantised, unpacked


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

    def shifted(self, change_OI: Tensor, bias: Tensor | None) -> LowBitLinear | None:
        """A change that is constant within each group is added to the zeros (QA-LoRA's merge); zeros that are no whole
        numbers are offsets, so the layer is an `AffineLinear` from then on."""
        width, groups = self.in_features, self.scales.shape[1]
        largest = self.dense(torch.float32).abs().amax()
        if self.order is not None or self._bits not in (4, 8) or self.codes.is_floating_point():
            return super().shifted(change_OI, bias)
        means_OG = constant_in_groups(change_OI, groups, width // groups, largest)
        if means_OG is None:
            return super().shifted(change_OI, bias)
        scales_OG = self.scales.float()
        zeros_OG = self._zero if self.zeros is None else self.zeros.float()
        codes = unpacked(self.codes, self._bits)
        codes = codes[:, ::2] << 4 | codes[:, 1::2] if self._bits == 4 else codes
        stored = codes, scales_OG, means_OG.float() - scales_OG * zeros_OG
        return AffineLinear(stored, width, self._bits, bias, self.compute_dtype)
