"""What parameter-efficient fine-tuning promises, beside full fine-tuning: SmolLM2-135M on film reviews.

    python -m benchmarks full_vs_peft            (half an hour on two cores; it resumes)

Every method learns from the same rows in the same order, with the same batches, schedule and seed; each tries
its learning rates, and the one with the lowest held-out loss is shown. Each run is a process of its own, so that
its peak memory is its own. Full fine-tuning is `tt.Full(targets="all")`: a copy of every weight is trained, in
float32, beside the frozen base; so its memory holds the base once more than a loop that trains in place.

A run that is done is kept in the results file, and not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from benchmarks.scatter import Mark, scatter
from recipes import assets

METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({"kind": "full", "targets": "all"}, (2e-5, 1e-4)),
    "LoRA r=16": ({"kind": "lora", "rank": 16, "alpha": 32}, (2e-4, 5e-4)),
    "LoRA r=2": ({"kind": "lora", "rank": 2, "alpha": 4}, (5e-4, 1e-3)),
    "(IA)³": ({"kind": "ia3"}, (5e-3, 2e-2)),
}
ROWS = (320, 200)


def one(
    method: dict[str, Any], lr: float, files: tuple[Path, Path], out: Path, **options: Any
) -> dict[str, Any]:
    """Train once, here, with further options of the recipe; the numbers of the run from what it left on disk."""
    from trimtab.train.api import train_recipe
    from trimtab.train.events import read_events
    from trimtab.train.recipe_file import make_recipe

    recipe = make_recipe(
        {
            "model": str(assets.smollm2()),
            "data": {"path": str(files[0]), "held_out": str(files[1])},
            "method": method,
            "optim": {"lr": lr, "schedule": "cosine", "warmup": 0.1},
            "batch": {"size": 8},
            "eval": {"metric": "choice", "samples": 0, "max_tokens": 5},
            "checkpoint": {"every": 10_000, "keep": 1},
            "dtype": "bfloat16",
            "out": str(out),
            **options,
        }
    )
    train_recipe(recipe, quiet=True)
    events = read_events(out / "events.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    start = next(event for event in events if event["event"] == "start")
    after = next(event for event in reversed(events) if event["event"] == "eval")
    forgotten = [event for event in events if event["event"] == "forgetting"]
    tail = steps[-max(len(steps) // 5, 1) :]
    return {
        "trained": start["parameters"],
        "share": start["parameters"] / start["model_parameters"],
        "bytes": sum(file.stat().st_size for file in (out / "adapter").iterdir()),
        "peak_bytes": events[-1]["peak_bytes"],
        "tokens_per_second": steps[-1]["tokens"] / sum(step["seconds"] for step in steps),
        "held_out_loss": after["loss"],
        "accuracy": after["answers"]["interval"],
        "gap": after["loss"]["value"] - sum(step["loss"] for step in tail) / len(tail),
        "forgetting": {event["of"]: event["loss"] for event in forgotten},
    }


def run(folder: Path, rows: tuple[int, int]) -> dict[str, Any]:
    """All runs that are not in the results yet."""
    path = folder / "full_vs_peft.json"
    found: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    )
    if found["runs"] and found["rows"] != list(rows):
        raise SystemExit(
            f"{path} was measured with {found['rows']} rows; remove it to measure anew."
        )
    found |= {"rows": list(rows), "machine": machine(), "commit": commit()}
    done = {(entry["method"], entry["lr"]) for entry in found["runs"]}
    data = assets.cache() / "full_vs_peft"
    files = assets.write_sentiment(data, train=rows[0], held_out=rows[1])
    for name, (method, rates) in METHODS.items():
        for lr in rates:
            if (name, lr) in done:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                call = [json.dumps(method), str(lr), *map(str, files), f"{scratch}/run"]
                said = subprocess.run(
                    [sys.executable, "-m", "benchmarks.full_vs_peft", "--one", *call],
                    check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                )  # fmt: skip
            entry = {"method": name, "lr": lr, **json.loads(said.stdout.splitlines()[-1])}
            found["runs"].append(entry)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, lr {lr:g}: loss {entry['held_out_loss']['value']:.4f}", flush=True)
    return found


def best(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For each method its run with the lowest held-out loss."""
    chosen: dict[str, dict[str, Any]] = {}
    for entry in found["runs"]:
        old = chosen.get(entry["method"])
        if old is None or entry["held_out_loss"]["value"] < old["held_out_loss"]["value"]:
            chosen[entry["method"]] = entry
    return [chosen[name] for name in METHODS if name in chosen]


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Full fine-tuning and adapters, side by side",
        "",
        f"SmolLM2-135M-Instruct, {found['rows'][0]} film reviews to learn from, {found['rows'][1]} held out; "
        f"bf16 base, {found['machine']['cpu']}, {found['machine']['cores']} cores; commit {found['commit']}. "
        "Best of two learning rates for each, by held-out loss. Made by `python -m benchmarks full_vs_peft`. "
        "Full fine-tuning trains a copy of every weight in float32 beside the base.",
        "",
        "![accuracy by trained parameters](full_vs_peft.svg)",
        "",
        "| method | lr | trained | of the model | file | peak memory | tokens/s | accuracy (95 %) | held-out loss "
        "| gap to training | perplexity of other text |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in best(found):
        accuracy, loss = entry["accuracy"], entry["held_out_loss"]
        lines.append(
            f"| {entry['method']} | {entry['lr']:g} | {entry['trained']:,} | {entry['share']:.2%} "
            f"| {entry['bytes'] / 2**20:.1f} MiB | {entry['peak_bytes'] / 2**30:.2f} GiB "
            f"| {entry['tokens_per_second']:.0f} "
            f"| {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] "
            f"| {loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}] | {entry['gap']:+.4f} "
            f"| {perplexities(entry)} |"
        )
    return "\n".join(lines) + "\n"


def perplexities(entry: dict[str, Any]) -> str:
    """Of unrelated text, without the adapter and with it."""
    values = entry["forgetting"]
    if not values:
        return "–"
    before, after = (math.exp(values[side]["value"]) for side in ("base", "adapter"))
    return f"{before:.2f} → {after:.2f}"


def picture(found: dict[str, Any]) -> str:
    """Accuracy with its interval over trained parameters, one mark a method; its area is the peak memory."""
    marks = [
        Mark(
            f"{entry['method']}, {entry['peak_bytes'] / 2**30:.1f} GiB",
            entry["trained"],
            entry["accuracy"]["value"],
            entry["accuracy"]["low"],
            entry["accuracy"]["high"],
            50 * entry["peak_bytes"] / 2**30,
        )
        for entry in best(found)
    ]
    return scatter(
        marks,
        above="share of held-out reviews judged right, with 95 % intervals",
        below="trained parameters; the area of a mark is the peak memory",
        room=130,
    )


def main(argv: list[str]) -> int:
    """Measure, and write JSON, Markdown and the picture."""
    parser = argparse.ArgumentParser(prog="full_vs_peft")
    parser.add_argument("--rows", nargs=2, type=int, default=ROWS, metavar=("TRAIN", "HELD_OUT"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        method, lr, train, held, out = options.one
        print(json.dumps(one(json.loads(method), float(lr), (Path(train), Path(held)), Path(out))))
        return 0
    found = run(options.out, tuple(options.rows))
    (options.out / "full_vs_peft.md").write_text(table(found), encoding="utf-8")
    (options.out / "full_vs_peft.svg").write_text(picture(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
