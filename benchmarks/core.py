"""Measuring side by side: each side in a process of its own, taking turns step by step in one run.

Both sides get the same weights, data, threads and allocator. The order within a round is reversed from
round to round, and a ratio is that of two steps of one round, so that what else the machine does falls
on both. Steps before the measured ones warm up; a side computes only while the others wait.

On a shared machine a round waits (`Patience`) until the other processes are quiet. Rounds go on until
enough of them were undisturbed, or there is no patience left, and those in which the others took the
least CPU time are counted: rounds are chosen by what the others did, never by what was measured.

What is counted: ``seconds`` is wall time of the side's ``step``; ``peak_bytes`` the high-water mark of
the process's resident memory during that step (weights, adapters, optimiser, activations, libraries, and
what the allocator keeps), which the kernel counts anew for each step.

A side is any class whose ``step(number)`` does the work of that step and returns facts that JSON can
hold, with ``units`` (how much was done: tokens, rows) where a rate is wanted. Other methods are called
by `Worker.call`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.worker import machine_seconds

ROOT = Path(__file__).resolve().parent.parent

ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**46)},
}
"""glibc's own settings, which give large freed blocks back at once; and settings that keep them."""


class SideError(RuntimeError):
    """A side failed; the message is its traceback."""


@dataclass(frozen=True, slots=True)
class Side:
    """``target`` is the class as ``module:Class``, made with ``options`` in its own process."""

    name: str
    target: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One step of one side. ``others`` is the share of the machine's CPU time that went to processes which
    are no part of the measurement; only a ``counted`` step enters the figures."""

    side: str
    step: int
    seconds: float
    cpu_seconds: float
    others: float
    peak_bytes: int
    result: Mapping[str, Any]
    counted: bool = False

    @property
    def rate(self) -> float:
        """Units per second."""
        return float(self.result["units"]) / self.seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and what lies around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """Median and range."""
        middle, low, high = (scale * value for value in (self.median, self.low, self.high))
        return f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def spreads(value: Any) -> Any:
    """What was read from JSON, with its medians and ranges as they were written."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {field.name for field in fields(Spread)}:
        return Spread(**value)
    return {key: spreads(each) for key, each in value.items()}


class Process(Protocol):
    """What a `Worker` needs of the process that it talks to."""

    stdin: IO[str] | None
    stdout: IO[str] | None

    def wait(self) -> int: ...


def started(side: Side, allocator: str, threads: int) -> Process:
    """A new Python that serves a side."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD"))}
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", side.target, json.dumps(dict(side.options))],
        env={**kept, **quiet, "OMP_NUM_THREADS": str(threads), **ALLOCATORS[allocator]},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )


class Worker:
    """A side's process. Raises `SideError` where the side does."""

    def __init__(self, side: Side, allocator: str, threads: int) -> None:
        self.side = side
        self._process = started(side, allocator, threads)
        try:
            self._read()
        except SideError:
            self.close()
            raise

    def ask(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of the side; what it gave, with time and memory."""
        assert self._process.stdin is not None
        print(json.dumps({"call": method, "args": args}), file=self._process.stdin, flush=True)
        return self._read()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the side; what it gave."""
        return self.ask(method, *args)["result"]

    def step(self, number: int) -> Sample:
        """Let the side do step ``number``."""
        return Sample(side=self.side.name, step=number, **self.ask("step", number))

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"{self.side.name}: ended with code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SideError(f"{self.side.name}: {found['error']}")
        return found


@contextmanager
def workers(sides: Sequence[Side], allocator: str, threads: int) -> Iterator[dict[str, Worker]]:
    """One process for each side, ready to be asked; all end with the ``with``."""
    running: dict[str, Worker] = {}
    try:
        for side in sides:
            running[side.name] = Worker(side, allocator, threads)
        yield running
    finally:
        for worker in running.values():
            worker.close()


@dataclass(frozen=True, slots=True)
class Patience:
    """A round is undisturbed where others take less than ``quiet`` of the machine. Before each round wait up
    to ``seconds`` for that; do at most ``factor`` times the rounds that are asked for."""

    quiet: float = 0.1
    seconds: float = 60.0
    factor: int = 3

    def wait(self) -> None:
        """Return when the machine was quiet for a second, or when ``seconds`` are over."""
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            before = machine_seconds()
            time.sleep(1)
            busy, total = (b - a for a, b in zip(before, machine_seconds(), strict=True))
            if busy < self.quiet * total:
                return


def take_turns(
    running: Mapping[str, Worker],
    *,
    warmup: int,
    rounds: int,
    patience: Patience = Patience(),
    say: Callable[[Sample], None] = lambda sample: None,
) -> list[Sample]:
    """``warmup`` steps of every side, then rounds of one step each, in alternating order; see above."""
    samples: list[Sample] = []
    worst: dict[int, float] = {}
    for number in range(warmup + rounds * patience.factor):
        patience.wait()
        order = list(running.values())
        for worker in order if number % 2 == 0 else order[::-1]:
            samples.append(worker.step(number))
            say(samples[-1])
        if number >= warmup:
            worst[number] = max(s.others for s in samples[-len(order) :])
        if sum(share < patience.quiet for share in worst.values()) == rounds:
            break
    chosen = sorted(worst, key=lambda number: worst[number])[:rounds]
    return [replace(sample, counted=sample.step in chosen) for sample in samples]


def hide_bitsandbytes() -> None:
    """Let this process unpack weights in four bits by plain torch, whatever is installed."""
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    warnings.filterwarnings("ignore", "bitsandbytes cannot be imported")


def of_side(samples: Sequence[Sample], side: str) -> list[Sample]:
    """The counted steps of a side, in the order of the rounds."""
    return [sample for sample in samples if sample.side == side and sample.counted]


def ratio(
    samples: Sequence[Sample], ours: str, peer: str, value: Callable[[Sample], float]
) -> Spread:
    """``value`` of our side over the peer's, within each round."""
    pairs = zip(of_side(samples, ours), of_side(samples, peer), strict=True)
    return Spread.of(value(mine) / value(other) for mine, other in pairs)
