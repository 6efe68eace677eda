"""Keep memory that was freed, on machines where new memory is dear.

glibc gives large freed blocks straight back to the system, so each training step maps its activations
anew, and every new page is a fault; under virtualised memory that can take most of the time of a step.
Two settings of its allocator keep freed memory in the process for the next step. They are those of the
environment variables ``MALLOC_MMAP_MAX_=0`` and ``MALLOC_TRIM_THRESHOLD_``, set from inside.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_NEVER = 2**31 - 1


def keep_memory() -> bool:
    """Ask glibc to keep freed memory; whether it agreed. Without glibc this does nothing."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
