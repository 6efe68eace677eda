"""One run of `benchmarks.methods`: train in this process, measure, and print the numbers as JSON.

python -m benchmarks.methods_run '[{"bench": …, "name": …, …}, [learn, choose, report], "folder"]'
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.methods_benches import BENCHES, RATES, Bench, Job
from recipes import assets

if TYPE_CHECKING:
    from trimtab.train.recipe import Recipe


def one(job: Job, rows: tuple[int, int, int], out: Path) -> dict[str, Any]:
    """Train once, in this process, and measure."""
    from rich.console import Console

    from trimtab.engine import Engine
    from trimtab.errors import TrimtabError
    from trimtab.evals import evaluate
    from trimtab.train.run import Run
    from trimtab.train.screen import Screen
    from trimtab.train.setup import opened_base
    from trimtab.train.sources import read_examples_of

    bench = BENCHES[job.bench]
    model, (train, choose, report) = files(bench, rows)
    try:
        given = recipe_of(bench, job, out, model, train, {"data.held_out": str(choose)})
        recipe, base, adapter = opened_base(given)
        outcome = Run(recipe, base, adapter, Screen(Console(quiet=True)), resume=False).go()
        assert outcome.after is not None
        data, _ = read_examples_of(
            recipe.data.replace(path=str(report)), base.tokenizer,
            Engine(base).context(adapter.name), held_out=False, task=recipe.task,
        )  # fmt: skip
        (found,) = evaluate(base, data, [adapter.name], metrics=["choice"], max_tokens=5)
    except TrimtabError as error:
        kind = "crash" if type(error).__name__ == "NonFiniteLossError" else "error"
        return {kind: f"{type(error).__name__}: {error}"}
    assert found.held_out is not None
    return {
        "lr": given.optim.lr,
        **_facts(out),
        "choosing_loss": outcome.after.held_out.loss.value,
        "loss": asdict(found.held_out.loss),
        "accuracy": asdict(found.metrics["choice"]),
        "bytes": sum(file.stat().st_size for file in (out / "adapter").iterdir()),
        **({"drift": drift(base, adapter.name)} if bench.classifies else {}),
    }


def recipe_of(
    bench: Bench, job: Job, out: Path, model: Path, train: Path, options: dict[str, Any]
) -> Recipe:
    """The recipe of a run: the bench's, with the job's method and rate."""
    from trimtab.adapt.parse import method_from
    from trimtab.train.recipe_file import make_recipe

    lr = RATES.get(job.name, method_from(job.method).lr) * job.factor
    return make_recipe(
        {**bench.recipe, "model": str(model), "method": job.method, "seed": job.seed, "out": str(out)},
        {"data.path": str(train), "optim.lr": lr, **options},
    )  # fmt: skip


def _facts(out: Path) -> dict[str, Any]:
    """What the events of a run say."""
    from trimtab.train.events import read_events

    events = read_events(out / "events.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    start = next(event for event in events if event["event"] == "start")
    tail = steps[-max(len(steps) // 5, 1) :]
    return {
        "trained": start["parameters"],
        "share": start["parameters"] / start["model_parameters"],
        "peak_bytes": events[-1]["peak_bytes"],
        "training_loss": sum(step["loss"] for step in tail) / len(tail),
        "forgetting": {
            event["of"]: event["loss"]["value"]
            for event in events
            if event["event"] == "forgetting"
        },
    }


def drift(base: Any, adapter: str) -> float:
    """Mean cosine between an unrelated text's sentence embeddings with and without the adapter: an encoder without
    a head over tokens has no perplexity."""
    import torch

    from trimtab.adapt.acting import using
    from trimtab.evals.forgetting import general_text

    texts = [text.strip() for text in general_text().split("\n\n") if text.strip()]
    inputs = base.tokenizer(
        texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    seen = inputs["attention_mask"][..., None]
    found = []
    with torch.no_grad():
        for who in (None, adapter):
            with using(base.model, who):
                hidden = base.model.base_model(**inputs).last_hidden_state
            own = hidden[:, -seen.shape[1] :].float()  # virtual tokens come before
            found.append((own * seen).sum(1) / seen.sum(1))
    return float(torch.cosine_similarity(*found).mean())


def files(bench: Bench, rows: tuple[int, int, int]) -> tuple[Path, list[Path]]:
    """The model's folder; and files to learn from, to choose by, to report on."""
    folder = assets.cache() / "methods" / f"{bench.name}-{'-'.join(map(str, rows))}"
    if bench.classifies:
        return assets.minilm(), assets.write_headlines(folder, train=rows[0], held_out=rows[1:])
    train, held = assets.write_sentiment(folder, train=rows[0], held_out=rows[1] + rows[2])
    lines = held.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = []
    for name, part in (("choose", lines[: rows[1]]), ("report", lines[rows[1] :])):
        parts.append(folder / f"{name}.jsonl")
        parts[-1].write_text("".join(part), encoding="utf-8")
    return assets.smollm2(), [train, *parts]


if __name__ == "__main__":
    values, counts, folder = json.loads(sys.argv[1])
    print(json.dumps(one(Job(**values), tuple(counts), Path(folder))))
