"""INT4 and INT8 weights with a scale and an offset for each group of columns (`trimtab.kernels.affine`)."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.frozen.lowbit import LowBitLinear, check_weight
from trimtab.kernels import affine


class AffineLinear(LowBitLinear):
    """A linear layer in whole numbers of 4 or 8 bits by group. What is the same for a group is added exactly."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor

    def __init__(
        self,
        stored: tuple[Tensor, Tensor, Tensor],
        in_features: int,
        bits: int,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        codes, scales_OG, offsets_OG = stored
        super().__init__(in_features, codes.shape[0], dtype)
        self.kind = "int4" if bits == 4 else "int8-group"
        self.code_bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales_OG)
        self.register_buffer("offsets", offsets_OG)
        self._hold(bias)

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, bits: int = 4, *, group: int = affine.GROUP
    ) -> AffineLinear:
        """Round a dense layer."""
        check_weight(weight)
        stored = affine.quantise_groups(weight, bits, group)
        return cls(stored, weight.shape[1], bits, bias, weight.dtype)

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.codes.shape[1] * (8 // self.code_bits) // self.scales.shape[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        return affine.dequantise_groups(
            self.codes, self.scales, self.offsets, self.in_features, self.code_bits, dtype
        )

    def like(self, weight: Tensor, bias: Tensor | None) -> AffineLinear:
        return AffineLinear.of(weight, bias, self.code_bits, group=self.group)

    def shifted(self, change_OI: Tensor, bias: Tensor | None) -> LowBitLinear | None:
        """A change that is constant within each group goes into the offsets (QA-LoRA's merge)."""
        largest = self.dense(torch.float32).abs().amax()
        count = self.scales.shape[1]
        means_OG = affine.constant_in_groups(change_OI, count, self.group, largest)
        if means_OG is None:
            return super().shifted(change_OI, bias)
        stored = self.codes.clone(), self.scales.clone(), self.offsets + means_OG.float()
        return AffineLinear(stored, self.in_features, self.code_bits, bias, self.compute_dtype)
