"""Does a base in four bits cost quality? SmolLM2-135M on film reviews, LoRA on bf16 and on NF4, three seeds each.

Batches, schedule and rate are those of the demo; its rows, and twice as many. Each run is a process of its own; one
that is done is kept in the results file, and not repeated.

    python -m benchmarks qlora_quality              (three hours on a core; it resumes)
    python -m benchmarks qlora_quality --seeds 1    (some of it; several such may run side by side)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import full_vs_peft
from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from recipes import assets

BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({}, {}),
    "NF4": ({}, {"storage": "nf4"}),
    "NF4, LoftQ's start": ({"init": "loftq"}, {"storage": "nf4"}),
}
"""Options of the method, and of the recipe."""
SEEDS = (0, 1, 2)
METHOD = {"kind": "lora", "rank": 16, "alpha": 32}
LR = 5e-4
ROWS = (640, 1280)
HELD_OUT = 400


def run(path: Path, chosen: Chosen) -> None:
    """All runs that are not in the results yet."""
    for rows, seed, base in product(chosen.rows, chosen.seeds, chosen.bases):
        if any((e["rows"], e["seed"], e["base"]) == (rows, seed, base) for e in known(path)):
            continue
        data = assets.cache() / f"qlora_quality_{rows}"
        files = assets.write_sentiment(data, train=rows, held_out=HELD_OUT)
        method, options = BASES[base]
        with tempfile.TemporaryDirectory() as scratch:
            given = [[str(f) for f in files], f"{scratch}/run", method, options | {"seed": seed}]
            said = subprocess.run(
                [sys.executable, "-m", "benchmarks.qlora_quality", "--one", json.dumps(given)],
                check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )  # fmt: skip
        measured = json.loads(said.stdout.splitlines()[-1])
        entry = {"rows": rows, "base": base, "seed": seed, "commit": commit(), **measured}
        runs = [*known(path), entry]  # others may have written meanwhile
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "runs": runs}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        loss, right = entry["held_out_loss"]["value"], entry["accuracy"]["value"]
        print(f"{rows}, {base}, seed {seed}: loss {loss:.4f}, accuracy {right:.4f}", flush=True)


def known(path: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    found: list[dict[str, Any]] = (
        json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    )
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    cpu = machine()
    lines = [
        "# LoRA on a base in four bits, beside bf16",
        "",
        f"SmolLM2-135M-Instruct, film reviews, {HELD_OUT} held out; LoRA r={METHOD['rank']}, rate {LR:g}; "
        f"{cpu['cpu']}, {cpu['cores']} cores; commits {', '.join(sorted({run['commit'] for run in runs}))}. Made by "
        "`python -m benchmarks qlora_quality`.",
    ]
    for rows in sorted({run["rows"] for run in runs}):
        some = sorted(
            (run for run in runs if run["rows"] == rows),
            key=lambda run: (list(BASES).index(run["base"]), run["seed"]),
        )
        lines += [
            "",
            f"## {rows:,} reviews to learn from",
            "",
            "| base | seed | held-out loss (95 %) | accuracy (95 %) | perplexity of other text | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for run in some:
            loss, right = run["held_out_loss"], run["accuracy"]
            lines.append(
                f"| {run['base']} | {run['seed']} | {loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}] "
                f"| {right['value']:.4f} [{right['low']:.4f}, {right['high']:.4f}] | {full_vs_peft.perplexities(run)} "
                f"| {run['peak_bytes'] / 2**30:.2f} GiB |"
            )
        found = means(some)
        if "bf16" in found:
            lines += ["", f"Means over seeds: {'; '.join(_said(found, base) for base in found)}."]
    return "\n".join([*lines, ""])


def means(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Base -> the means of held-out loss and accuracy, of those with all seeds."""
    found = {}
    for base in BASES:
        some = [run for run in runs if run["base"] == base]
        if len(some) == len(SEEDS):
            found[base] = {
                name: statistics.mean(run[name]["value"] for run in some)
                for name in ("held_out_loss", "accuracy")
            }
    return found


def _said(found: dict[str, dict[str, float]], base: str) -> str:
    loss, right = found[base]["held_out_loss"], found[base]["accuracy"]
    more = f" ({loss - found['bf16']['held_out_loss']:+.4f})" if base != "bf16" else ""
    return f"{base} {loss:.4f}{more}, accuracy {right:.4f}"


@dataclass(frozen=True)
class Chosen:
    """Which runs are asked for."""

    rows: Sequence[int]
    seeds: Sequence[int]
    bases: Sequence[str]


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="qlora_quality")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        (train, held), out, method, given = json.loads(options.one)
        files = (Path(train), Path(held))
        print(json.dumps(full_vs_peft.one(METHOD | method, LR, files, Path(out), **given)))
        return 0
    path = options.out / "qlora_quality.json"
    run(path, Chosen(options.rows, options.seeds, options.bases))
    (options.out / "qlora_quality.md").write_text(table(known(path)), encoding="utf-8")
    print(table(known(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
