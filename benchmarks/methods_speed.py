"""Training tokens per second of every method: all take turns in one process, some steps each, several times.

What else the machine does falls on all of them; the table shows each method's median beside that of full
fine-tuning.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.methods_benches import Bench, Job, methods_of
from benchmarks.methods_run import files, recipe_of

ROUNDS = 3
STEPS, WARM = 6, 2
"""Steps of a turn, and how many of these do not count."""


def measured(bench: Bench) -> dict[str, list[float]]:
    """Method -> its tokens per second in each round; methods that cannot run are left out."""
    from trimtab.errors import TrimtabError

    found: dict[str, list[float]] = {}
    refused = set()
    for number in range(ROUNDS):
        for name, method in methods_of(bench).items():
            if name in refused:
                continue
            try:
                rate = turn(bench, Job(bench.name, name, method, min(bench.factors), 0))
            except TrimtabError:
                refused.add(name)
                continue
            found.setdefault(name, []).append(rate)
            print(f"{bench.name}: round {number + 1}, {name}: {rate:,.0f} tokens/s", flush=True)
    return found


def turn(bench: Bench, job: Job) -> float:
    """Some steps of a method; their median tokens per second."""
    from rich.console import Console

    from trimtab.train.events import read_events
    from trimtab.train.run import Run
    from trimtab.train.screen import Screen
    from trimtab.train.setup import opened_base

    model, (train, *_) = files(bench, bench.rows)
    options: dict[str, Any] = {"steps": STEPS, "eval.forgetting": False}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        recipe, base, adapter = opened_base(recipe_of(bench, job, out, model, train, options))
        Run(recipe, base, adapter, Screen(Console(quiet=True)), resume=False).go()
        steps = [event for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    rates = [
        (step["tokens"] - before["tokens"]) / step["seconds"]  # tokens are counted from the start
        for before, step in pairwise(steps)
    ]
    return median(rates[WARM - 1 :])
