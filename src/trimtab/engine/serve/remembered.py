"""What adapters remember of a generation (gates, invocations), from one batch to the next.

A forward keeps such things by unit of its batch, under keys that name their owner. Requests come and go between
forwards, so each request keeps its own unit's share, and a batch is given those of its requests, side by side. Where an
owner has nothing to say of a request it is given zeros, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Memory = dict[Any, Any]


def joined(memories: Sequence[Memory]) -> Memory:
    """One memory for a batch of requests, from theirs."""
    keys = dict.fromkeys(key for memory in memories for key in memory)
    return {key: _joined([memory.get(key) for memory in memories]) for key in keys}


def split(memory: Memory, count: int) -> list[Memory]:
    """Each request's own, of a batch of ``count``."""
    return [{key: _one(value, unit) for key, value in memory.items()} for unit in range(count)]


def _joined(values: Sequence[Any]) -> Any:
    known = next((value for value in values if value is not None), None)
    if isinstance(known, tuple):
        own = [(None,) * len(known) if value is None else value for value in values]
        return tuple(_joined(parts) for parts in zip(*own, strict=True))
    if isinstance(known, Tensor):
        return torch.cat([torch.zeros_like(known) if v is None else v for v in values])
    return known


def _one(value: Any, unit: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_one(part, unit) for part in value)
    return value[unit : unit + 1] if isinstance(value, Tensor) else value
