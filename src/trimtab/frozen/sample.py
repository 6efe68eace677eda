"""Short hashes of a few values of a tensor, by which it is known again."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_VALUES = 512


@torch.no_grad()
def sample(tensor: Tensor) -> str:
    """Of up to 512 values, evenly spaced, as bfloat16."""
    chosen = _some(tensor.detach().reshape(-1))
    return _short(chosen.to(torch.bfloat16).cpu().contiguous().view(torch.int16))


def sample_codes(codes: Tensor) -> str:
    """Of as many bytes; the same weight has the same codes on every machine."""
    return _short(_some(codes.reshape(-1).view(torch.uint8)).cpu().contiguous())


def _some(flat: Tensor) -> Tensor:
    return flat[:: max(flat.numel() // _VALUES, 1)][:_VALUES]


def _short(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
