"""Weights in eight bits: integers with one scale a row, and fp8 with one scale a block.

INT8   code = round(w / s),   s = max |w| / 127 of the row           8 + 32/in bits a weight
FP8    code = fp8(w / s),     s = max |w| / 448 of a block of 128 × 128 (E4M3: 4 bits of exponent, 3 of fraction)
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels import accelerators

PIECE = 1 << 20
BLOCK = 128
FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of E4M3."""


def quantise_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and fp32 scales of the rows; an empty row has scale 0 and codes 0."""
    scales_O = weight_OI.detach().float().abs().amax(1) / 127
    inverse_O1 = _inverse(scales_O)[:, None]
    codes = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    for rows, start in _pieces(weight_OI):
        part = inverse_O1[start : start + len(rows)]
        codes[start : start + len(rows)] = (rows.float() * part).round_().clamp_(-127, 127)
    return codes, scales_O


def dequantise_rows(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    """Products in fp32, rounded once to ``dtype``; by our own kernel on CUDA."""
    if accelerators.triton_for(codes_OI):
        from trimtab.kernels import fused

        return fused.eight_bit_rows(codes_OI, scales_O, dtype)
    return unpacked_rows(codes_OI, scales_O, dtype)


def unpacked_rows(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain torch, some rows at a time."""
    out = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    if out.is_meta:
        return out
    for rows, start in _pieces(codes_OI):
        out[start : start + len(rows)] = rows.float() * scales_O[start : start + len(rows), None]
    return out


def quantise_blocks(weight_OI: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """fp8 codes and the fp32 scales (out blocks, in blocks); the last blocks may be short."""
    wide = weight_OI.detach().float()
    filled = _filled(wide, block)
    rows, cols = filled.shape[0] // block, filled.shape[1] // block
    tiles = filled.view(rows, block, cols, block)
    scales = tiles.abs().amax((1, 3)) / LARGEST
    scaled = tiles * _inverse(scales)[:, None, :, None]
    flat = scaled.view(filled.shape)[: wide.shape[0], : wide.shape[1]]
    return flat.clamp(-LARGEST, LARGEST).to(FP8), scales


def dequantise_blocks(
    codes_OI: Tensor, scales: Tensor, dtype: torch.dtype, block: int = BLOCK
) -> Tensor:
    """Products in fp32, rounded once to ``dtype``."""
    out = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    if out.is_meta:
        return out
    for number, start in enumerate(range(0, codes_OI.shape[0], block)):
        wide = codes_OI[start : start + block].float()
        each = scales[number].repeat_interleave(block)[: wide.shape[1]]
        out[start : start + block] = wide * each
    return out


def _pieces(matrix: Tensor) -> list[tuple[Tensor, int]]:
    """Some rows at a time, each with the number of the first; all at once where there are no values."""
    if matrix.is_meta:
        return [(matrix, 0)]
    some = max(1, PIECE // max(matrix.shape[1], 1))
    return [(matrix[start : start + some], start) for start in range(0, matrix.shape[0], some)]


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, 1 / scales.clamp_min(1e-38), 0.0)


def _filled(matrix: Tensor, block: int) -> Tensor:
    rows, cols = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -cols % block, 0, -rows % block))
