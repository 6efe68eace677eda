"""The process of one side: reads calls as JSON lines from stdin, answers as JSON lines on stdout.

Started by `benchmarks.core.Worker`, which sets the allocator and the threads in its environment:
glibc reads the former before any Python runs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

STATUS, RESET, CPUS = (Path("/proc", name) for name in ("self/status", "self/clear_refs", "stat"))


def reset_peak() -> None:
    """Start the kernel's high-water mark of resident memory anew."""
    RESET.write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most resident memory of this process since `reset_peak`."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def machine_seconds() -> tuple[float, float]:
    """CPU seconds that this machine has had so far: (in use, in all), over all cores."""
    fields = CPUS.read_text(encoding="ascii").splitlines()[0].split()[1:9]
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle, and waiting for a disk


def answer(side: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run one call, and say what it gave, how long it took and how much memory it needed."""
    reset_peak()
    busy, total = machine_seconds()
    cpu, start = time.process_time(), time.perf_counter()
    result = getattr(side, request["call"])(*request["args"])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    busy, total = (now - then for now, then in zip(machine_seconds(), (busy, total), strict=True))
    return {
        "result": result,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "others": max(busy - cpu, 0.0) / max(total, 0.01),
        "peak_bytes": peak_bytes(),
    }


def serve(target: str, options: dict[str, Any], questions: TextIO, answers: TextIO) -> int:
    """Make the side (``module:Class``, with ``options``) and answer until there are no more questions.

    Returns an exit code; what the side raises is the last answer.
    """
    try:
        module, _, name = target.partition(":")
        side = getattr(import_module(module), name)(**options)
        gc.collect()
        print(json.dumps({"result": "ready"}), file=answers, flush=True)
        for line in questions:
            print(json.dumps(answer(side, json.loads(line))), file=answers, flush=True)
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=answers, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    # Libraries print; what they say goes to stderr, so that stdout holds answers only.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        code = serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, channel)
    sys.exit(code)
