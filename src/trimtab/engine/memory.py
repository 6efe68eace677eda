"""Keep memory that was freed, on machines where new memory is dear.

glibc gives large freed blocks straight back to the system, so each training step maps its activations
anew, and every new page is a fault; under virtualised memory that can take most of the time of a step.
Two settings of its allocator keep freed memory in the process for the next step: the heap is never trimmed,
and blocks up to 32 MiB (the most that glibc allows) come from the heap. Larger ones are still mapped and given
back, one by one: kept in the heap as well, blocks of ever other sizes would break it into pieces, and the
process would grow without end.

Kept memory breaks into pieces too, when steps of other sizes follow: `release_memory` gives back what is free just
now. A run does so after a step in which the process grew, so that its peak is what one step needs, and steps of a
steady size pay for their pages once.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in malloc.h
_NEVER = 2**31 - 1
_LARGEST = 32 * 2**20


def keep_memory() -> bool:
    """Ask glibc to keep freed memory; whether it agreed. Without glibc this does nothing."""
    mallopt = _glibc("mallopt", ctypes.c_int, ctypes.c_int)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))


def release_memory() -> bool:
    """Give memory that is kept and free back to the system; whether there was some. Without glibc nothing is done."""
    trim = _glibc("malloc_trim", ctypes.c_size_t)
    return trim is not None and bool(trim(0))


def _glibc(name: str, *kinds: Any) -> Any:
    """A function of glibc that takes such arguments and returns an int, or None."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None)[name]
    except (AttributeError, OSError):
        return None
    found.argtypes, found.restype = kinds, ctypes.c_int
    return found
