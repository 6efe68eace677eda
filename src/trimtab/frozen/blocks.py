"""Weights that stay in the blocks of a GGUF file (`trimtab.kernels.gguf`)."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.gguf import dequantised, kinds


class BlocksLinear(LowBitLinear):
    """A linear layer with a weight in GGUF blocks: ``codes`` (O, bytes of a row), of the type ``block_kind``."""

    kind = "gguf"
    codes: Tensor

    def __init__(
        self, codes_OB: Tensor, block_kind: int, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        values, size, _ = kinds()[block_kind]
        super().__init__(codes_OB.shape[1] // size * values, codes_OB.shape[0], dtype)
        self.block_kind = block_kind
        self.register_buffer("codes", codes_OB)
        self._hold(bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantised(self.codes, self.block_kind, dtype)
