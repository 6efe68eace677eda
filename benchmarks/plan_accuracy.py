"""How near `trimtab plan` comes: predicted and measured peak memory and time, on runs of different kinds.

    python -m benchmarks plan_accuracy              # memory (it does not depend on how busy the machine is)
    python -m benchmarks plan_accuracy --time       # time too, on a quiet machine
    python -m benchmarks plan_accuracy --skip run   # plan again beside what was measured

Each plan and each run is a process of its own, one after the other, as a person would start them; each result is
written at once. Memory is predicted without the weights. The two constants of a CPU (`trimtab.train.devices`) are
fitted to the runs of `FITTED` by least squares of the relative error, and checked on the runs of `CHECKED`, which the
fit does not see.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from recipes import assets
from trimtab.train.devices import CPU_LIBRARIES

TEXT = ("data.path={text}", "data.too_long=split", "data.held_out=null", "eval.forgetting=false")
CLASSES = (
    "model={minilm}", "data.path={classes}", "data.held_out=null", "task=sequence-classification", "dtype=float32"
)  # fmt: skip
FITTED: dict[str, tuple[str, ...]] = {
    "text of 512 tokens, LoRA, 2048": (
        *TEXT, "data.max_tokens=512", "method=lora(rank=16)", "batch.tokens=2048", "steps=3",
    ),
    "text of 256 tokens, IA3, float32, 512": (
        *TEXT, "data.max_tokens=256", "method=ia3", "dtype=float32", "batch.tokens=512", "steps=2",
    ),
    "text of 256 tokens, NF4, LoRA, blocks recomputed, 512": (
        *TEXT, "data.max_tokens=256", "method=lora(rank=8)", "storage=nf4", "memory.recompute=blocks",
        "batch.tokens=512", "steps=2",
    ),
}  # fmt: skip
CHECKED: dict[str, tuple[str, ...]] = {
    "text of 512 tokens, bottleneck, 1024": (
        *TEXT, "data.max_tokens=512", "method=bottleneck", "batch.tokens=1024", "steps=2",
    ),
    "MiniLM, classes, full, float32": (
        *CLASSES, "method={{kind: full, targets: all}}", "batch.size=32", "steps=6",
    ),
    "MiniLM, classes, LoRA, float32": (*CLASSES, "method=lora(rank=8)", "batch.size=8", "steps=8"),
    "short chats, LoRA, answers asked": (
        "eval.forgetting=false", "method=lora(rank=16)", "batch.size=8", "steps=4", "eval.metric=choice",
        "eval.limit=8", "eval.max_tokens=4",
    ),
    "text of 256 tokens, full, float32, 1024": (
        *TEXT, "data.max_tokens=256", "method={{kind: full, targets: all}}", "dtype=float32", "batch.tokens=1024",
        "steps=2",
    ),
    "text of 512 tokens, LoRA, blocks recomputed, 1024": (
        *TEXT, "data.max_tokens=512", "method=lora(rank=16)", "memory.recompute=blocks", "batch.tokens=1024",
        "steps=2",
    ),
    "text of 256 tokens, NF4, LoRA, 512": (
        *TEXT, "data.max_tokens=256", "method=lora(rank=16)", "storage=nf4", "batch.tokens=512", "steps=2",
    ),
    "text of 256 tokens, DoRA, INT8, micro-batches of 256": (
        *TEXT, "data.max_tokens=256", "method=dora(rank=8)", "storage=int8", "batch.tokens=512",
        "batch.micro_tokens=256", "steps=2",
    ),
    "MiniLM, classes, IA3, float32, 64 at once": (*CLASSES, "method=ia3", "batch.size=64", "steps=4"),
    "text of 512 tokens, prefix, float32, MLPs recomputed, 1024": (
        *TEXT, "data.max_tokens=512", "method=prefix(length=16)", "dtype=float32", "memory.recompute=mlp",
        "batch.tokens=1024", "steps=2",
    ),
    "short chats, FP4, LoRA, 32 at once": (
        "eval.forgetting=false", "method=lora(rank=16)", "storage=fp4", "batch.size=32", "steps=2",
    ),
}  # fmt: skip
"""Overrides of each run; SmolLM2-135M-Instruct and short chats where they name no other. The last three were added
after the form of the prediction and its constants were settled."""


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="plan_accuracy")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--time", action="store_true", help="predict time too, by real steps")
    parser.add_argument("--only", nargs="+", default=[], help="runs whose names hold one of these")
    parser.add_argument(
        "--skip", nargs="+", choices=("plan", "run"), default=[], help="what stays as it is"
    )
    options = parser.parse_args(argv)
    file = options.out / "plan_accuracy.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows: dict[str, Any] = known.get("rows", {}) if isinstance(known.get("rows"), dict) else {}
    for name, overrides in (FITTED | CHECKED).items():
        if options.only and not any(part in name for part in options.only):
            continue
        arguments = arguments_of(overrides)
        found = rows.setdefault(name, {"overrides": list(overrides)})
        if "plan" not in options.skip:
            found["predicted"] = predicted(arguments, timed=options.time)
        if "run" not in options.skip:
            with tempfile.TemporaryDirectory() as scratch:
                found["measured"] = measured(arguments, Path(scratch) / "run")
        print(name, *note(found), flush=True)
        file.write_text(json.dumps(known | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    result = summed_up(rows)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "plan_accuracy.md").write_text(table(result), encoding="utf-8")
    return 0


def arguments_of(overrides: tuple[str, ...]) -> list[str]:
    """The arguments of both commands; the files that they name are written."""
    folder = assets.cache() / "plan"
    train, held = assets.write_sentiment(folder, train=640, held_out=24)
    text = folder / "text.txt"
    text.write_text("\n\n".join(article for article, _ in assets.bbc()[:100]), encoding="utf-8")
    places = {"text": text, "minilm": assets.minilm(), "classes": classes(train)}
    return [
        "--model", str(assets.smollm2()), "--data", str(train), "--held-out", str(held),
        *(one.format(**places) for one in overrides),
    ]  # fmt: skip


def predicted(arguments: list[str], *, timed: bool) -> dict[str, Any]:
    """The plan of a run: the peak, and the bytes of each phase by part."""
    command = [sys.executable, "-m", "trimtab", "plan", *arguments, "--json"]
    dry = json.loads(output([*command, "--dry"]))
    found = {
        "memory": dry["peak"],
        "phase": dry["phase"],
        "phases": dry["phases"],
        "file": dry["parts"]["file"],
        "process": dry["parts"]["libraries"] - CPU_LIBRARIES,
    }
    return {**found, "seconds": json.loads(output(command))["seconds"]} if timed else found


def classes(chats: Path) -> Path:
    """The texts and labels of labelled chats, as a table."""
    out = chats.with_name("classes.jsonl")
    lines = []
    for line in chats.read_text(encoding="utf-8").splitlines():
        asked, said = (turn["content"] for turn in json.loads(line)["messages"])
        lines.append(json.dumps({"text": asked.partition("Review: ")[2], "label": said}))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def output(command: list[str]) -> str:
    """What a command prints; a run that does not fit ends with 1 and is planned all the same."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode > 1:
        raise SystemExit(f"{' '.join(command)} failed")
    return done.stdout


def measured(arguments: list[str], out: Path) -> dict[str, float]:
    """Run it; the seconds from its start to its end, and the peak of its memory."""
    command = [sys.executable, "-m", "trimtab", "train", *arguments, f"out={out}", "--quiet"]
    subprocess.run(command, check=True, cwd=ROOT)
    lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = {event["event"]: event for event in map(json.loads, lines)}
    start, end = events["start"], events["end"]
    return {"seconds": end["time"] - start["time"], "memory": end["peak_bytes"]}


def summed_up(rows: Mapping[str, Any]) -> dict[str, Any]:
    """All rows, with what the constants are by the fitted runs and what they then predict."""
    done = {name for name, row in rows.items() if note(row)}
    fitted, checked = ([name for name in names if name in done] for names in (FITTED, CHECKED))
    result: dict[str, Any] = {"machine": machine(), "commit": commit(), "rows": dict(rows)}
    if len(fitted) > 1:
        result["fit"] = fit([rows[name] for name in fitted])
    return {**result, "fitted": fitted, "checked": checked}


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """``libraries`` (bytes) and ``loss`` with the least sum of squared relative errors."""
    peaks = torch.tensor([row["measured"]["memory"] for row in rows], dtype=torch.float64)
    moments = [(row["predicted"], _heaviest(row["predicted"])) for row in rows]
    moving = torch.tensor([moment["moving"] for _, moment in moments], dtype=torch.float64)
    known = [moment["apart"] + plan["file"] + plan["process"] for plan, moment in moments]
    known = torch.tensor(known) / peaks
    shares = torch.stack([1 / peaks, moving / peaks], dim=1)
    libraries, loss = (
        torch.linalg.lstsq(shares, (1 - known).unsqueeze(1)).solution.flatten().tolist()
    )
    return {"libraries": libraries, "loss": loss}


def _heaviest(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = plan["phases"][plan["phase"]]
    return found


def note(found: Mapping[str, Any]) -> list[str]:
    """How near a plan comes, in words."""
    if "measured" not in found or "predicted" not in found:
        return []
    plan, done = found["predicted"]["memory"], found["measured"]["memory"]
    return [f"memory {plan / done:.2f} x of {done / 2**20:.0f} MiB"]


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    fitted = result.get("fit", {"libraries": 0.0, "loss": 0.0})
    lines = [
        "# What `trimtab plan` predicts, and what was measured",
        "",
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores, {os.cpu_count()} threads; commit "
        f"{result['commit']}. Made by `python -m benchmarks plan_accuracy`. SmolLM2-135M-Instruct, in bfloat16 unless "
        "said otherwise. Memory is the peak of the process's resident memory, predicted without the weights. "
        "Times, where they were taken, are from the start of a run to its end, measurements included.",
        "",
        "Two constants of a CPU, fitted to the runs of the first table and checked on those of the second: libraries "
        f"take {fitted['libraries'] / 2**20:.0f} MiB beside what the process holds that plans, and a loss of the "
        f"allocator of {fitted['loss']:.2f} of the most "
        "that small blocks other than weights take at once. Blocks of 32 MiB or more, which the system maps one by "
        "one, and smaller ones are counted each at their own heaviest moment.",
    ]
    for title, names in (("Fitted", FITTED), ("Checked", CHECKED)):
        lines += ["", f"## {title}", "", *_lines(result["rows"], names)]
    checked = [
        result["rows"][name]["measured"]["memory"] for name in CHECKED if name in result["rows"]
    ]
    if checked:
        lines += ["", f"The checked runs span {max(checked) / min(checked):.1f} x in memory."]
    return "\n".join(lines) + "\n"


def _lines(rows: Mapping[str, Any], names: Mapping[str, Any]) -> list[str]:
    lines = [
        "| run | tensors | peak predicted | measured | ratio | time predicted | measured | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if name not in rows or not note(rows[name]):
            continue
        p, m = rows[name]["predicted"], rows[name]["measured"]
        tensors = sum(_heaviest(p)["parts"].values()) + p["file"]
        memory = [tensors, p["memory"], m["memory"]]
        cells = [f"{size / 2**20:,.0f} MiB" for size in memory] + [
            f"{p['memory'] / m['memory']:.2f}"
        ]
        if "seconds" in p:
            seconds = p["seconds"], m["seconds"]
            cells += [*(f"{each:.0f} s" for each in seconds), f"{seconds[0] / seconds[1]:.2f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
