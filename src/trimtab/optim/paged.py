"""Tensors in CUDA's unified memory: the driver moves their pages to the host when the device is full, and back when
they are used (QLoRA's paged optimisers, Dettmers et al. 2023, arXiv 2305.14314, section 3).
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError

_GLOBAL = 1  # cudaMemAttachGlobal: any stream may use it


def paged_zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of a CUDA tensor's shape, dtype and device, in memory that may be paged out.

    Raises:
        ConfigError: CUDA's runtime is not found, or has no such memory to give.
    """
    if not tensor.numel():
        return torch.zeros_like(tensor)
    pages = _Pages(tensor.nbytes, tensor.device)
    found = torch.as_tensor(pages, device=tensor.device)  # which keeps the pages for as long
    return found.view(tensor.dtype).view(tensor.shape).zero_()


class _Pages:
    """Bytes of unified memory, freed with this object."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._runtime = _runtime()
        self._pointer = ctypes.c_void_p()
        with torch.cuda.device(device):
            wrong = self._runtime.cudaMallocManaged(
                ctypes.byref(self._pointer), ctypes.c_size_t(size), ctypes.c_uint(_GLOBAL)
            )
        if wrong:
            raise ConfigError(
                f"memory.optimiser: paged: CUDA gave no unified memory for {size:,} bytes (error {wrong}); use host."
            )
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (self._pointer.value, False),
            "version": 2,
        }

    def __del__(self) -> None:
        if self._pointer:
            self._runtime.cudaFree(self._pointer)


@lru_cache
def _runtime() -> Any:
    """CUDA's runtime library, as torch has loaded it."""
    major = (torch.version.cuda or "").partition(".")[0]
    name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise ConfigError(
            f"memory.optimiser: paged needs CUDA's unified memory, and {name} is not found; use host."
        ) from None
