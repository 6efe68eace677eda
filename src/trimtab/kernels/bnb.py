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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def there() -> bool:
    """Whether its operations can be called; why not is said once."""
    return _found()


@cache
def _found() -> bool:
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
    return True


def _without(why: str) -> bool:
    """Say, once in a process, that there is no accelerator."""
    warnings.warn(
        f"{why}: weights in four bits are unpacked by plain torch (on CUDA by Triton where that is there), to the same "
        "numbers.",
        stacklevel=3,
    )
    return False


def can(shape: tuple[int, ...], block: int, dtype: torch.dtype) -> bool:
    """Whether it is there and makes such a weight.

    Its CPU kernel takes wrong scales where a block goes over the end of a row, so rows of whole blocks are asked for.
    """
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and math.prod(shape) % block == 0 and there()


def dequantised(
    codes: Tensor, scales: Tensor, block: int, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The dense weight."""
    rows = shape if shape[-1] % block == 0 else (math.prod(shape) // block, block)
    made: Any = torch.ops.bitsandbytes.dequantize_4bit.default
    dense: Tensor = made(codes[:, None], scales, block, kind, rows, dtype)
    return dense.view(shape)
