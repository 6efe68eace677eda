"""Checkpoints of bitsandbytes, read without it: codes and scales go as they are into our own layers.

A 4-bit weight lies as ``weight`` (codes), ``weight.absmax`` (scales, or codes of them), ``weight.nested_absmax`` and a
JSON of the rest as bytes, ``weight.quant_state.bitsandbytes__nf4``; an 8-bit one as ``weight`` and ``SCB``, the
largest magnitude of each row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ModelError
from trimtab.frozen.eightbit import Int8Linear
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.fourbit import OUTER, TABLES, FourBit
from trimtab.models import packed

STATE = "weight.quant_state.bitsandbytes__"
PARTS: Mapping[str, tuple[str, ...]] = {
    "4bit": (
        "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
        *(STATE + kind for kind in TABLES), "weight",
    ),
    "8bit": ("SCB", "weight_format", "weight"),
}  # fmt: skip
"""How a weight is stored -> the names of its tensors."""


def names(how: str) -> tuple[str, ...]:
    """The names of the tensors of a weight that is stored so."""
    return PARTS[how] if how in PARTS else packed.NAMES[how]


def read(
    how: str,
    path: str,
    parts: Mapping[str, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> LowBitLinear:
    """The layer at a path from its stored tensors.

    Raises:
        ModelError: a tensor is missing, or what it says is not what Trimtab reads.
    """
    if how not in PARTS:
        return packed.layer(how, path, parts, bias, dtype, facts)
    return (_four_bits if how == "4bit" else _eight_bits)(path, parts, bias, dtype)


def _four_bits(
    path: str, parts: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> FourBitLinear:
    kind = next((kind for kind in TABLES if STATE + kind in parts), None)
    if kind is None:
        raise ModelError(
            f"{path}: the checkpoint lacks {STATE}nf4, without which its codes mean nothing; download it again."
        )
    facts: dict[str, Any] = json.loads(bytes(parts[STATE + kind].tolist()))
    nested = "nested_blocksize" in facts
    for name in ("weight.absmax", "weight.nested_absmax") if nested else ("weight.absmax",):
        if name not in parts:
            raise ModelError(f"{path}: the checkpoint lacks {name}; download it again.")
    table = parts.get("weight.quant_map")
    known = torch.tensor(TABLES[kind])
    if table is not None and not torch.allclose(table.float().cpu(), known, atol=1e-6):
        raise ModelError(f"{path}: its table of {kind} is not the one that Trimtab knows.")
    if nested and facts["nested_blocksize"] != OUTER:
        raise ModelError(f"{path}: scales in blocks of {facts['nested_blocksize']} are not read.")
    codes = parts["weight"].contiguous().view(torch.uint8).flatten()
    scales = parts["weight.absmax"]
    outer = parts["weight.nested_absmax"].float() if nested else None
    mean = torch.tensor(facts["nested_offset"], device=codes.device) if nested else None
    four = FourBit(kind, tuple(facts["shape"]), codes, scales, outer, mean, facts["blocksize"])
    return FourBitLinear(four, bias, dtype)


def _eight_bits(
    path: str, parts: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Int8Linear:
    if "SCB" not in parts:
        raise ModelError(
            f"{path}: the checkpoint lacks SCB, the scales of its rows; download it again."
        )
    layout = parts.get("weight_format")
    if layout is not None and int(layout) != 0:
        raise ModelError(
            f"{path}: an 8-bit weight in the layout of an old GPU is not read; save it again with bitsandbytes."
        )
    return Int8Linear(parts["weight"], parts["SCB"].float().flatten() / 127, bias, dtype)
