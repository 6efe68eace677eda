"""Keep memory that was freed, on machines where new memory is dear.

glibc gives large freed blocks straight back to the system, so each training step maps its activations
anew, and every new page is a fault; under virtualised memory that can take most of the time of a step.
Two settings of its allocator keep freed memory in the process for the next step: the heap is never trimmed,
and blocks up to 32 MiB (the most that glibc allows) come from the heap. Larger ones are still mapped and given
back, one by one: kept in the heap as well, blocks of ever other sizes would break it into pieces, and the
process would grow without end.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in malloc.h
_NEVER = 2**31 - 1
_LARGEST = 32 * 2**20


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
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
