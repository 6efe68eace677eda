"""Weights as codes with a scale for each group of columns: what GPTQ, AWQ, compressed-tensors and GGUF store.

    ŵ[o, i] = (code[o, i] − zero[o, g]) · scale[o, g],      g = i // (I / G), or order[i] where columns were sorted

Codes are whole numbers of 2, 4 or 8 bits, several a byte, the first in its lowest bits; or fp8 numbers, without a zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 20
"""Most values that are widened at once."""


@dataclass(frozen=True, eq=False)
class Grouped:
    """A weight in groups: ``codes`` (O, I · bits / 8) as bytes, or (O, I) in fp8; ``scales`` and ``zeros`` (O, G), the
    latter None where all are ``zero``; ``order`` (I) the group of each column, None where they lie in order."""

    codes: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor | None = None
    zero: int = 0
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def check(self) -> None:
        """Raise `ValueError` for scales, zeros or an order that do not fit the codes."""
        out, width = self.shape
        groups = self.scales.shape[1]
        if self.scales.shape[0] != out or (self.order is None and width % groups):
            raise ValueError(f"scales of shape {tuple(self.scales.shape)} for {out} x {width}")
        if self.zeros is not None and self.zeros.shape != self.scales.shape:
            raise ValueError(f"zeros of shape {tuple(self.zeros.shape)} for {out} x {groups}")
        if self.order is not None and (len(self.order) != width or int(self.order.max()) >= groups):
            raise ValueError(f"an order of {len(self.order)} columns for {out} x {width}")


def packed(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes (uint8) as bytes."""
    per = 8 // bits
    if codes_OI.shape[1] % per:
        raise ValueError(f"{codes_OI.shape[1]} codes of {bits} bits do not fill whole bytes")
    each = codes_OI.view(codes_OI.shape[0], -1, per)
    out = each[..., 0].clone()
    for place in range(1, per):
        out |= each[..., place] << (bits * place)
    return out


def unpacked(bytes_OB: Tensor, bits: int) -> Tensor:
    """The codes (uint8) in bytes."""
    if bits == 8:
        return bytes_OB
    mask = (1 << bits) - 1
    each = [(bytes_OB >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(each, -1).flatten(-2)


def words(values: Tensor, bits: int) -> Tensor:
    """The codes (uint8) in words of 32 bits, the first in the lowest bits, on a new last axis."""
    shifts = torch.arange(0, 32, bits, device=values.device, dtype=torch.int32)
    return ((values.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8)


def dequantised(weight: Grouped, dtype: torch.dtype) -> Tensor:
    """The dense weight: products in fp32, rounded once to ``dtype``."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.codes.device)
    some = max(1, PIECE // max(columns, 1))
    for start in range(0, rows, some):
        here = slice(start, start + some)
        codes = weight.codes[here]
        wide = codes.float() if codes.is_floating_point() else unpacked(codes, weight.bits).float()
        scales = weight.scales[here].float()
        zeros = None if weight.zeros is None else weight.zeros[here].float()
        if weight.order is not None:
            scales = scales[:, weight.order]
            zeros = None if zeros is None else zeros[:, weight.order]
        wide = wide.view(*scales.shape, -1)
        wide = wide - (weight.zero if zeros is None else zeros[..., None])
        out[here] = (wide * scales[..., None]).view(-1, columns)
    return out
