"""Weights in few bits made dense in one pass by Triton: the twin of the plain torch in `fourbit` and `eightbit`.

One program makes a run of values: it reads their codes, their scales (8-bit codes of them are resolved on the way) and
writes products rounded once. Products and sums are not contracted (``enable_fp_fusion=False``), so that every value is
the one that plain torch gives. To torch each is an operation like any other, so whatever calls it can be compiled.

This module imports Triton; it is imported where there is a CUDA tensor and Triton is installed, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.kernels.fourbit import OUTER, TABLES, dynamic_table

BYTES = 1024
"""Bytes of codes a program reads."""


@triton.jit
def _four_bit_kernel(
    codes, scales, outer, mean, table, table8, out, count,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    there = 2 * at < count
    block = 2 * at // BLOCK  # of both values: a block holds an even number
    scale = tl.load(scales + block, mask=there, other=0)
    if NESTED:
        below = tl.load(outer + block // OUTER, mask=there, other=0.0)
        scale = tl.load(table8 + scale.to(tl.int32)) * below + tl.load(mean)
    byte = tl.load(codes + at, mask=there, other=0).to(tl.int32)
    high = tl.load(table + (byte >> 4)) * scale.to(tl.float32)
    low = tl.load(table + (byte & 15)) * scale.to(tl.float32)
    to = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + to, tl.interleave(high, low).to(out.dtype.element_ty), mask=to < count)


@triton.jit
def _rows_kernel(codes, scales, out, width, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    value = tl.load(codes + row * width + column, mask=column < width, other=0).to(tl.float32)
    value *= tl.load(scales + row)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=column < width)


@torch.library.custom_op("trimtab::four_bit", mutates_args=())
def four_bit(
    codes: Tensor,
    scales: Tensor,
    outer: Tensor | None,
    mean: Tensor | None,
    kind: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight of the parts of a `trimtab.kernels.fourbit.FourBit`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    nested = outer is not None and mean is not None
    parts = (outer, mean) if nested else (scales, scales)  # the latter are not read
    tables = _table(kind, codes.device), dynamic_table(codes.device)
    if out.numel():
        with torch.cuda.device_of(codes):
            _four_bit_kernel[(triton.cdiv(codes.numel(), BYTES),)](
                codes, scales, *parts, *tables, out, out.numel(), block, OUTER, nested, BYTES,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


@torch.library.custom_op("trimtab::eight_bit_rows", mutates_args=())
def eight_bit_rows(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight of int8 codes and the fp32 scales of their rows."""
    codes_OI = codes_OI.contiguous()
    rows, width = codes_OI.shape
    out = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    if out.numel():
        with torch.cuda.device_of(codes_OI):
            _rows_kernel[(rows, triton.cdiv(width, BYTES))](
                codes_OI, scales_O.contiguous(), out, width, BYTES, enable_fp_fusion=False
            )
    return out


@four_bit.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    outer: Tensor | None,
    mean: Tensor | None,
    kind: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@eight_bit_rows.register_fake
def _(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)


@cache
def _table(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(TABLES[kind], dtype=torch.float32, device=device)
