"""Booleans at one bit each: eight to a byte, the first in the lowest bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed(values: Tensor) -> Tensor:
    """A boolean tensor as bytes; the last byte is filled up with zeros."""
    flat = values.flatten().to(torch.uint8)
    filled = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (filled << _places(values)).sum(1, dtype=torch.uint8)


def unpacked(bytes_: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first bits of `packed`, as an int8 tensor of zeros and ones in ``shape``."""
    bits = (bytes_[:, None] >> _places(bytes_)) & 1
    return bits.flatten()[: math.prod(shape)].view(shape).to(torch.int8)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
