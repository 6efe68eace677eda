"""Weights in the blocks of GGUF files, made dense.

A row of a weight is cut into blocks, which lie as bytes: a scale and the codes of 32 values (Q8_0, Q4_0), or scales
of scales and the codes of 256 (the K and IQ kinds). The two of 32 are unpacked here,

    Q8_0   2 bytes scale (fp16), 32 bytes codes               ŵ = scale · code
    Q4_0   2 bytes scale (fp16), 16 bytes codes               ŵ = scale · (code − 8)
           (0 to 15 in the lower halves of the bytes, 16 to 31 in the upper)

and the others by transformers, in releases that have them as torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

Q4_0, Q8_0 = 2, 8
PIECE = 1 << 20
"""Most values that are unpacked at once."""
Unpack = Callable[[Tensor, torch.dtype], Tensor]


def _q8_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return (scales * blocks[:, 2:].contiguous().view(torch.int8).float()).to(dtype)


def _q4_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
    return (scales * (codes.float() - 8)).to(dtype)


OWN: Mapping[int, tuple[int, int, Unpack]] = {Q4_0: (32, 18, _q4_0), Q8_0: (32, 34, _q8_0)}
"""Type -> values of a block, its bytes, and how it is unpacked."""


@cache
def kinds() -> dict[int, tuple[int, int, Unpack]]:
    """All types that can be unpacked here."""
    try:
        theirs = import_module("transformers.integrations.gguf.dequant")
    except ImportError:
        return dict(OWN)
    found: dict[int, tuple[int, int, Unpack]] = {}
    for kind, (values, size) in theirs.GGML_BLOCK.items():

        def unpack(blocks: Tensor, dtype: torch.dtype, kind: int = kind) -> Tensor:
            return theirs.dequantize(blocks.flatten(), kind, torch.float32).to(dtype)

        found[int(kind)] = int(values), int(size), unpack
    return found | dict(OWN)


def dequantised(rows_OB: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (O, I) of rows of blocks as bytes."""
    values, size, unpack = kinds()[kind]
    columns = rows_OB.shape[1] // size * values
    out = torch.empty(rows_OB.shape[0], columns, dtype=dtype, device=rows_OB.device)
    some = max(1, PIECE // max(columns, 1))
    for start in range(0, rows_OB.shape[0], some):
        here = rows_OB[start : start + some]
        out[start : start + some] = unpack(here.reshape(-1, size), dtype).view(len(here), columns)
    return out
