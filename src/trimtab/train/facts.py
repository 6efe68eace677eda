"""What a result depends on beside the recipe: versions, the machine, the data."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trimtab.data import Datum

PACKAGES = ("trimtab", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, and the accelerator where there is one."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    memory = whole_memory(torch.device("cpu"))
    if memory is not None:
        facts["memory"] = f"{memory / 2**30:.1f} GiB"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["accelerator"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return facts


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: of the accelerator, else of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def own_memory() -> int | None:
    """Bytes that this process holds for itself now, files that it reads apart; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    anonymous = lines.get("RssAnon")
    return None if anonymous is None else int(anonymous.split()[0]) * 1024


def whole_memory(device: torch.device) -> int | None:
    """Bytes of memory: of the accelerator, else of the machine; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def digest(data: Sequence[Datum]) -> str:
    """SHA-256 of examples as the model sees them: their tokens, targets and weights."""
    found = hashlib.sha256()
    for datum in data:
        found.update(repr((datum.tokens, datum.targets, datum.weights)).encode())
    return found.hexdigest()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
