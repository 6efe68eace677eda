"""Every method on real tasks, beside full fine-tuning: what it reaches, and what it costs.

    python -m benchmarks methods                          (hours on two cores; it resumes)
    python -m benchmarks methods --bench minilm --only lora ia3 --retry
    python -m benchmarks methods --bench smollm2 --speed  (only that; minutes, on a quiet machine)

minilm: MiniLM tells sarcastic headlines from plain ones; every method of the registry with its defaults, its
named settings, and variants below; each trains the classification head too. "head only" trains nothing else: it
is the floor, and full fine-tuning what the others are compared with.
smollm2: SmolLM2-135M answers whether a film review is positive; the methods that are used most.

Every method has the same rows in the same order, batches, schedule, and number of learning rates: its default
times each of the bench's factors, all with seed 0. The rate with the lowest loss on rows kept for choosing is run
again with seed 1; what is reported is measured on other rows, over both seeds. A run is a process of its own, so
that its peak memory is its own. It is written to the results when it ends, and not repeated; a method that cannot
run is there with its error (``--retry`` tries those again).

Runs may share the machine (``--workers 2``), so their speed is not counted: `benchmarks.methods_speed` measures
it at last, all methods taking turns in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks import methods_speed, methods_table
from benchmarks.core import ROOT
from benchmarks.methods_benches import BENCHES, Bench, Job, methods_of
from benchmarks.report import commit, machine

SECONDS = 1200
"""After which a run is given up."""


Measure = Callable[[Job, Bench], dict[str, Any]]
"""Runs a job; the numbers, or ``error`` (the method refused) or ``crash`` (it failed)."""


def next_job(bench: Bench, name: str, method: str, runs: Sequence[dict[str, Any]]) -> Job | None:
    """What is still to be run of a method: each rate, then the best one with another seed."""
    own = [run for run in runs if run["name"] == name]
    if any("error" in run for run in own):
        return None
    done = {(run["factor"], run["seed"]) for run in own}
    for factor in bench.factors:
        if (factor, 0) not in done:
            return Job(bench.name, name, method, factor, 0)
    best = methods_table.best_rate(own)
    if best is None or (best, 1) in done:
        return None
    return Job(bench.name, name, method, best, 1)


def in_process(job: Job, bench: Bench) -> dict[str, Any]:
    """Run a job in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        call = json.dumps([asdict(job), bench.rows, f"{scratch}/run"])
        try:
            said = subprocess.run(
                [sys.executable, "-m", "benchmarks.methods_run", call],
                capture_output=True, text=True, cwd=ROOT, timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"crash": f"it took more than {SECONDS} seconds"}
    if said.returncode:
        lines = said.stderr.strip().splitlines() or [f"it ended with code {said.returncode}"]
        return {"crash": lines[-1]}
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


# -- all runs --------------------------------------------------------------------------------------


def run(
    path: Path,
    bench: Bench,
    measure: Measure = in_process,
    *,
    only: Sequence[str] = (),
    retry: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """All runs of a bench that are not in the results yet; each is written as it ends."""
    found = read(path, bench)
    mine = found[bench.name]
    known = methods_of(bench)
    if unknown := [name for name in only if name not in known]:
        raise SystemExit(
            f"{bench.name} has no method {unknown[0]!r}; there are: {', '.join(known)}"
        )
    if retry:
        mine["runs"] = [one for one in mine["runs"] if not {"error", "crash"} & one.keys()]

    def each(name: str) -> None:
        while (job := next_job(bench, name, known[name], mine["runs"])) is not None:
            entry = {**asdict(job), **measure(job, bench), "commit": commit()}
            with writing:
                mine["runs"].append(entry)
                write(path, found)
            print(methods_table.line(entry), flush=True)

    writing = Lock()
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(each, name) for name in only or known]:
            done.result()
    return found


def read(path: Path, bench: Bench) -> dict[str, Any]:
    """The results so far, with a place for the bench; of the same settings, though rates may have been added."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mine = found.setdefault(bench.name, {"settings": bench.settings(), "runs": []})
    now = bench.settings()
    if mine["runs"] and mine["settings"] | {"factors": now["factors"]} != now:
        raise SystemExit(
            f"{path} was measured with other settings of {bench.name}; remove them from it to measure anew."
        )
    mine |= {"settings": now, "machine": machine()}
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """All results, or the old ones: never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main(argv: list[str]) -> int:
    """Measure; write JSON, Markdown and the pictures."""
    parser = argparse.ArgumentParser(prog="methods")
    parser.add_argument("--bench", nargs="+", choices=tuple(BENCHES), default=[*BENCHES])
    parser.add_argument("--only", nargs="+", default=(), metavar="METHOD", help="of one bench")
    parser.add_argument("--retry", action="store_true", help="run what failed again")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--speed", action="store_true", help="measure the speed alone, once more")
    parser.add_argument("--rows", nargs=3, type=int, metavar=("LEARN", "CHOOSE", "REPORT"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    path = options.out / "methods.json"
    for name in options.bench:
        bench = BENCHES[name]
        if options.rows:
            bench = Bench(**{**vars(bench), "rows": tuple(options.rows)})
        if not options.speed:
            run(path, bench, only=options.only, retry=options.retry, workers=options.workers)
        found = read(path, bench)
        if options.speed or "speed" not in found[name]:
            found[name]["speed"] = methods_speed.measured(bench)
            write(path, found)
    methods_table.write(options.out, json.loads(path.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
