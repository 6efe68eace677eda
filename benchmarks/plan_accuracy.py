"""How near `trimtab plan` comes: predicted and measured peak memory and time, on runs of different kinds.

    python -m benchmarks plan_accuracy

Each plan and each run is a process of its own, one after the other, as a person would start them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from recipes import assets

RUNS: dict[str, list[str]] = {
    "short chats, LoRA r=16": ["method=lora(rank=16)", "batch.size=8", "steps=24"],
    "short chats, answers asked": [
        "method=lora(rank=8)", "batch.size=8", "steps=12", "eval.metric=choice", "eval.limit=100",
        "eval.max_tokens=4",
    ],
    "plain text of 512 tokens, bottleneck": [
        "data.path={text}", "data.too_long=split", "data.max_tokens=512", "data.held_out=null",
        "method=bottleneck", "batch.tokens=2048", "steps=6",
    ],
    "plain text, float32, full": [
        "data.path={text}", "data.too_long=split", "data.max_tokens=256", "data.held_out=null",
        "method={kind: full, targets: all}", "dtype=float32", "batch.tokens=1024", "steps=6",
    ],
}  # fmt: skip


def measured(arguments: list[str], out: Path) -> dict[str, float]:
    """Run it; the wall time of the command less that of its start, and the peak of its memory."""
    command = [sys.executable, "-m", "trimtab", "train", *arguments, f"out={out}", "--quiet"]
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    wall = time.perf_counter() - began
    events = [
        json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    start, end = (next(e for e in events if e["event"] == kind) for kind in ("start", "end"))
    return {"seconds": end["time"] - start["time"], "wall": wall, "peak": end["peak_bytes"]}


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="plan_accuracy")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    train, held = assets.write_sentiment(assets.cache() / "plan", train=640, held_out=100)
    text = assets.cache() / "plan" / "text.txt"
    text.write_text("\n\n".join(article for article, _ in assets.bbc()[:100]), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for name, overrides in RUNS.items():
        arguments = [
            "--model", str(assets.smollm2()), "--data", str(train), "--held-out", str(held),
            *(one.format(text=text) if "{text}" in one else one for one in overrides),
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "trimtab", "plan", *arguments, "--json"]
            said = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            found = measured(arguments, Path(scratch) / "run")
        predicted = json.loads(said.stdout)
        rows.append({"run": name, "predicted": predicted, "measured": found})
        print(
            f"{name}: time {predicted['seconds'] / found['seconds']:.2f} x, "
            f"memory {predicted['peak'] / found['peak']:.2f} x of what was measured",
            flush=True,
        )
    result = {"machine": machine(), "commit": commit(), "rows": rows}
    (options.out / "plan_accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "plan_accuracy.md").write_text(table(result), encoding="utf-8")
    return 0


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What `trimtab plan` predicts, and what was measured",
        "",
        f"SmolLM2-135M-Instruct, {result['machine']['cpu']}, {result['machine']['cores']} cores; commit "
        f"{result['commit']}. Made by `python -m benchmarks plan_accuracy`. Times are from the start of a run to its "
        "end, measurements included.",
        "",
        "| run | time predicted | measured | ratio | peak memory predicted | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        p, m = row["predicted"], row["measured"]
        lines.append(
            f"| {row['run']} | {p['seconds']:.0f} s | {m['seconds']:.0f} s | {p['seconds'] / m['seconds']:.2f} "
            f"| {p['peak'] / 2**30:.2f} GiB | {m['peak'] / 2**30:.2f} GiB | {p['peak'] / m['peak']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
