"""Where Triton makes weights dense: chosen here for all formats."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def triton_for(codes: Tensor) -> bool:
    """Whether `trimtab.kernels.fused` is to be imported for these codes: they are on CUDA, and Triton is installed."""
    return HAS_TRITON and codes.is_cuda
