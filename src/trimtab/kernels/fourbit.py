"""Weights in four bits: NF4 and FP4 with double quantisation (QLoRA, arXiv 2305.14314), bit for bit as bitsandbytes.

A weight, read row by row, is cut into blocks of 64 values w with one scale each:

    s = max |w|,    code = the number of the table's value nearest to w / s,    ŵ = table[code] · s

Two codes share a byte, the first in its upper half. The scales would cost half a bit a weight; so they are quantised
too, in blocks of 256 with 8-bit codes of a table of their own, after their mean is taken off:

    s ≈ table8[code8] · s₂ + mean                                   4 + 8/64 + 32/(64 · 256) = 4.127 bits a weight

The table of NF4 has quantiles of the normal distribution (its zero is exact); that of FP4 has a sign, two bits of
exponent and one of fraction. All is plain torch and runs anywhere; bitsandbytes unpacks where it is installed,
and on CUDA without it `trimtab.kernels.fused`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kernels import accelerators, bnb

BLOCK, OUTER = 64, 256
PIECE = 1 << 17
"""Values that are unpacked at a time, so that they stay in a core's cache."""
Kind = Literal["nf4", "fp4"]

TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class FourBit:
    """A weight in four bits. ``codes`` holds two a byte; ``scales`` are those of the blocks, or 8-bit codes of them,
    and then ``outer`` are the scales of these and ``mean`` is what was taken off."""

    kind: str
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    outer: Tensor | None = None
    mean: Tensor | None = None
    block: int = BLOCK

    @property
    def whole(self) -> bool:
        """Whether there are as many codes and scales as the shape asks for."""
        count = math.prod(self.shape)
        blocks = -(-count // max(self.block, 1))
        outer = blocks if self.outer is None else self.outer.numel() * OUTER
        return (
            self.block > 1
            and self.block % 2 == 0
            and self.codes.numel() == -(-count // 2)
            and self.scales.numel() == blocks
            and blocks <= outer < blocks + OUTER
        )

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.outer, self.mean)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def quantise(
    weight: Tensor, kind: Kind = "nf4", *, block: int = BLOCK, nested: bool = True
) -> FourBit:
    """Round a weight to four bits; ``nested`` quantises the scales too.

    Raises:
        ConfigError: there is no such table, or a block is not an even number of values.
    """
    if kind not in TABLES:
        raise ConfigError(f"there is no table of four bits called {kind!r}; there are nf4 and fp4.")
    if block < 2 or block % 2 or block > PIECE:
        raise ConfigError(
            f"blocks of {block!r} values: two codes share a byte, so a block holds an even number of values, at most "
            f"{PIECE}."
        )
    flat = weight.detach().reshape(-1)
    size = flat.numel() if flat.is_meta else PIECE // block * block
    pieces = [_codes(piece.float(), kind, block) for piece in flat.split(size)]
    codes = torch.cat([one for one, _ in pieces])
    scales = torch.cat([one for _, one in pieces])
    shape = tuple(weight.shape)
    if not nested:
        return FourBit(kind, shape, codes, scales, block=block)
    mean = scales.mean()
    eight, outer = quantise_scales(scales - mean)
    return FourBit(kind, shape, codes, eight, outer, mean, block)


def dequantise(packed: FourBit, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight: products in fp32, rounded once to ``dtype``. By bitsandbytes where it is there; else by our own
    kernel on CUDA; else by plain torch."""
    codes, block, kind, shape = packed.codes, packed.block, packed.kind, packed.shape
    if bnb.can(shape, block, dtype):
        return bnb.dequantised(codes, block_scales(packed), block, kind, shape, dtype)
    if accelerators.triton_for(codes):
        from trimtab.kernels import fused

        parts = (packed.scales, packed.outer, packed.mean)
        return fused.four_bit(codes, *parts, kind, block, shape, dtype)
    return unpacked(packed, block_scales(packed), dtype)


def unpacked(packed: FourBit, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain torch, a cache's worth at a time; without values there is nothing to unpack."""
    if packed.codes.is_meta:
        return torch.empty(packed.shape, dtype=dtype, device="meta")
    count = 1
    for size in packed.shape:
        count *= size
    out = torch.empty(
        -(-count // packed.block) * packed.block, dtype=dtype, device=packed.codes.device
    )
    rows, codes = out.view(-1, packed.block), packed.codes
    if rows.numel() > 2 * codes.numel():
        codes = torch.nn.functional.pad(codes, (0, rows.numel() // 2 - codes.numel()))
    words = _pairs(packed.kind, codes.device)
    per = max(PIECE // packed.block, 1)
    for start in range(0, rows.shape[0], per):
        some = codes[start * packed.block // 2 : (start + per) * packed.block // 2]
        values = words.index_select(0, some.int()).view(torch.float32).view(-1, packed.block)
        rows[start : start + per] = values * scales[start : start + per, None]
    return out[:count].view(packed.shape)


def block_scales(packed: FourBit) -> Tensor:
    """The scales of the blocks, in fp32."""
    if packed.outer is None or packed.mean is None:
        return packed.scales.float()
    return dequantise_scales(packed.scales, packed.outer) + packed.mean


def quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of fp32 values in blocks of 256, and the scales of these blocks."""
    table = dynamic_table(scales.device)
    rows, count = _in_rows(scales, OUTER)
    outer = rows.abs().amax(1)
    scaled = (rows * _reciprocal(outer)[:, None]).clamp(-1, 1)
    bounds = (table[:-1] + table[1:]) / 2
    return torch.bucketize(scaled, bounds).to(torch.uint8).reshape(-1)[:count], outer


def dequantise_scales(codes: Tensor, outer: Tensor) -> Tensor:
    """fp32 values from their 8-bit codes and the scales of their blocks."""
    rows, count = _in_rows(dynamic_table(codes.device)[codes.int()], OUTER)
    return (rows * outer[:, None]).reshape(-1)[:count]


def _codes(flat: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of some whole blocks; the last may be short."""
    rows, count = _in_rows(flat, block)
    scales = rows.abs().amax(1)
    scaled = (rows * _reciprocal(scales)[:, None]).clamp(-1, 1).reshape(-1)[:count]
    if count % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    bounds, order = _bounds(kind, flat.device)
    codes = order[torch.bucketize(scaled, bounds, out_int32=True)]
    return codes[::2] << 4 | codes[1::2], scales


def _in_rows(flat: Tensor, width: int) -> tuple[Tensor, int]:
    """Values as rows of a width, the last filled with zeros; and how many values there are."""
    count = flat.numel()
    missing = -count % width
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, width), count


def _reciprocal(scales: Tensor) -> Tensor:
    return 1.0 / scales.clamp_min(1e-38)


@cache
def _bounds(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints of the sorted table; and the code of each value between them."""
    table = torch.tensor(TABLES[kind], dtype=torch.float32, device=device)
    order = table.argsort()
    return (table[order[:-1]] + table[order[1:]]) / 2, order.to(torch.uint8)


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two fp32 values of each byte as one word of 64 bits: a gather of words is several times as fast."""
    table = torch.tensor(TABLES[kind], dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return (
        torch.stack([table[byte >> 4], table[byte & 15]], 1)
        .contiguous()
        .view(torch.int64)
        .flatten()
    )


def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2
        scale = 10.0 ** (exponent - 6)
        values += (scale * means).tolist() + (-scale * means).tolist()
    return tuple(sorted(values))


_DYNAMIC = _dynamic_values()


@cache
def dynamic_table(device: torch.device) -> Tensor:
    """The 256 values of signed dynamic 8-bit numbers (arXiv 1511.04561), sorted: 7 exponents, each with twice as many
    fractions as the one below, zero and one."""
    return torch.tensor(_DYNAMIC, dtype=torch.float32, device=device)
