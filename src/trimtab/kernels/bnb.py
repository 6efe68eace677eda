"""bitsandbytes as an accelerator of `trimtab.kernels.fourbit`, where it is installed and new enough."""

from __future__ import annotations

import logging
import math
import re
import warnings
from functools import cache
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

OLDEST = (0, 49)
"""The first release whose CPU kernels give these numbers for FP4: 0.46 refuses it, 0.47 and 0.48 are off in 16 bits."""


@cache
def operation() -> Any:
    """``dequantize_4bit(codes, scales, block, kind, shape, dtype)``, or None; why not is said once."""
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return _without("bitsandbytes is not installed")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return _without(f"bitsandbytes {version} is too old (from {wanted} on)")
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of a faster product that is not what is used here
    try:
        import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        return _without(f"bitsandbytes cannot be imported ({error})")
    finally:
        logger.setLevel(level)
    return torch.ops.bitsandbytes.dequantize_4bit.default


def _without(why: str) -> None:
    """Say, once in a process, that there is no accelerator."""
    warnings.warn(
        f"{why}: weights in four bits are unpacked by plain torch, to the same numbers.",
        stacklevel=3,
    )


def dequantised(
    codes: Tensor, scales: Tensor, block: int, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """The dense weight, or None where bitsandbytes cannot make it.

    Its CPU kernel takes wrong scales where a block goes over the end of a row, so rows of whole blocks are asked for.
    """
    count = math.prod(shape)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or count % block:
        return None
    made = operation()
    if made is None:
        return None
    rows = shape if shape[-1] % block == 0 else (count // block, block)
    dense: Tensor = made(codes[:, None], scales, block, kind, rows, dtype)
    return dense.view(shape)
