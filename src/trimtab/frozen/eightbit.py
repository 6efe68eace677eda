"""INT8 and fp8 weights (`trimtab.kernels.eightbit`)."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.frozen.lowbit import LowBitLinear, check_weight
from trimtab.kernels import eightbit


class Int8Linear(LowBitLinear):
    """A linear layer in int8 with one scale a row."""

    kind = "int8"
    codes: Tensor
    scales: Tensor

    def __init__(
        self, codes_OI: Tensor, scales_O: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(codes_OI.shape[1], codes_OI.shape[0], dtype)
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scales", scales_O)
        self._hold(bias)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Round a dense layer."""
        check_weight(weight)
        return cls(*eightbit.quantise_rows(weight), bias, weight.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return eightbit.dequantise_rows(self.codes, self.scales, dtype)

    def like(self, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        return Int8Linear.of(weight, bias)


class Fp8Linear(LowBitLinear):
    """A linear layer in fp8 (E4M3) with one scale for each block of 128 × 128."""

    kind = "fp8"
    codes: Tensor
    scales: Tensor

    def __init__(
        self, codes_OI: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(codes_OI.shape[1], codes_OI.shape[0], dtype)
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scales", scales)
        self._hold(bias)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Fp8Linear:
        """Round a dense layer."""
        check_weight(weight)
        return cls(*eightbit.quantise_blocks(weight), bias, weight.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return eightbit.dequantise_blocks(self.codes, self.scales, dtype)

    def like(self, weight: Tensor, bias: Tensor | None) -> Fp8Linear:
        return Fp8Linear.of(weight, bias)
