"""Weights as whole numbers with a scale and an offset for each group of columns of a row (asymmetric INT4 and INT8).

    ŵ = s · code + m,    code = round((w − m) / s) in 0 … L,    m = min w,   s = (max w − min w) / L,   L = 2^bits − 1

m is the zero point z in other words, m = −s z, and it is no whole number: a change that is the same for all columns of
a group is added to m, and no code changes (QA-LoRA, arXiv 2309.14717, §3.3). Offsets are fp32, and scales too in 8
bits; in 4 bits they are bfloat16, which is 0.03 of a step at most. In groups of 64 a weight takes 4.75 or 9 bits. A
last group may be short; it is filled up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import ConfigError

GROUP = 64
PIECE = 1 << 20
_SCALES = {4: torch.bfloat16, 8: torch.float32}


def quantise_groups(
    weight_OI: Tensor, bits: int = 4, group: int = GROUP
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (O, bytes of the groups), scales_OG and offsets_OG; in 4 bits two codes share a byte, the first above.

    Raises:
        ConfigError: other bits than 4 or 8, or groups of an odd size.
    """
    if bits not in (4, 8):
        raise ConfigError(f"groups of whole numbers have 4 or 8 bits, not {bits!r}.")
    if group < 2 or group % 2:
        raise ConfigError(f"a group holds an even number of columns, not {group!r}.")
    rows, columns = weight_OI.shape
    groups, wide = -(-columns // group), bits == 8
    codes = weight_OI.new_empty(rows, groups * group // (1 if wide else 2), dtype=torch.uint8)
    scales = weight_OI.new_empty(rows, groups, dtype=_SCALES[bits])
    offsets = weight_OI.new_empty(rows, groups, dtype=torch.float32)
    for start in range(0, rows, per := max(1, PIECE // max(columns, 1))):
        part = slice(start, start + per)
        found, scales[part], offsets[part] = _rounded(weight_OI.detach()[part].float(), bits, group)
        codes[part] = found if wide else found[:, ::2] << 4 | found[:, 1::2]
    return codes, scales, offsets


def dequantise_groups(
    codes: Tensor,
    scales_OG: Tensor,
    offsets_OG: Tensor,
    columns: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Products and sums in fp32, rounded once to ``dtype``."""
    rows, groups = scales_OG.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    for start in range(0, rows, per := max(1, PIECE // max(columns, 1))):
        part = slice(start, start + per)
        some = codes[part]
        if bits == 4:
            some = torch.stack([some >> 4, some & 15], 2).flatten(1)
        values = some.unflatten(1, (groups, -1)).float()
        values = values * scales_OG[part, :, None].float() + offsets_OG[part, :, None]
        out[part] = values.flatten(1)[:, :columns]
    return out


def constant_in_groups(
    change_OI: Tensor, groups: int, group: int, largest: Tensor
) -> Tensor | None:
    """The value of each group's columns (O, G), where they are all the same; None where they are not.

    The same is up to the rounding of an fp32 sum of weights as large as ``largest``, from which a change was taken.
    """
    columns = change_OI.shape[1]
    filled = torch.nn.functional.pad(change_OI, (0, groups * group - columns))
    sums = filled.unflatten(1, (groups, group)).sum(2)
    sizes = (columns - group * torch.arange(groups, device=sums.device)).clamp(max=group)
    means_OG = sums / sizes
    off = (change_OI - means_OG.repeat_interleave(group, 1)[:, :columns]).abs().amax()
    limit = 4 * torch.finfo(torch.float32).eps * (largest + change_OI.abs().amax())
    return means_OG if bool(off <= limit) else None


def _rounded(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes one a byte, scales and offsets of some rows."""
    most = 2**bits - 1
    missing = -rows.shape[1] % group
    filled = torch.nn.functional.pad(rows[:, None], (0, missing), mode="replicate")[:, 0]
    tiles = filled.unflatten(1, (-1, group))
    low, high = tiles.amin(2), tiles.amax(2)
    scales = ((high - low) / most).to(_SCALES[bits])
    inverse = torch.where(scales > 0, 1 / scales.float().clamp_min(1e-38), 0.0)
    codes = ((tiles - low[..., None]) * inverse[..., None]).round_().clamp_(0, most)
    return codes.to(torch.uint8).flatten(1), scales, low
