"""Where Triton computes: chosen here for all kernels."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def triton_for(tensor: Tensor) -> bool:
    """Whether what imports Triton is to be imported for this tensor: it is on CUDA, and Triton is installed."""
    return HAS_TRITON and tensor.is_cuda
