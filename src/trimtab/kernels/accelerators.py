"""Where Triton computes: chosen here for all kernels."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def triton_for(tensor: Tensor) -> bool:
    """Whether to import what imports Triton for this tensor: it is on CUDA, and Triton is installed and runs there."""
    if not (HAS_TRITON and tensor.is_cuda):
        return False
    return torch.compiler.is_compiling() or _runs(
        tensor.device
    )  # a compiler has its own use of Triton


@cache
def _runs(device: torch.device) -> bool:
    """Whether a kernel is built and runs there: Triton takes a C compiler, which containers may lack, and a GPU that it
    knows."""
    try:
        from trimtab.kernels import fused

        one = torch.ones(1, device=device)
        fused.eight_bit_rows(one[None].to(torch.int8), one, torch.float32)
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        warnings.warn(
            f"Triton is installed and does not run on {device}, so that plain torch computes what it would, with more "
            f"time and memory: {why[:200]}",
            stacklevel=2,
        )
        return False
    return True
