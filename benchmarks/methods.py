"""Every method on real tasks, beside full fine-tuning: what it reaches, and what it costs.

    python -m benchmarks methods                          (hours on two cores; it resumes)
    python -m benchmarks methods --bench minilm --only lora ia3 --retry

minilm: MiniLM tells sarcastic headlines from plain ones; every method of the registry with its defaults, its
named settings, and variants below; each trains the classification head too. "head only" trains nothing else: it
is the floor, and full fine-tuning what the others are compared with.
smollm2: SmolLM2-135M answers whether a film review is positive; the methods that are used most.

Every method has the same rows in the same order, batches, schedule, and number of learning rates: its default
times each of the bench's factors, all with seed 0. The rate with the lowest loss on rows kept for choosing is run
again with seed 1; what is reported is measured on other rows, over both seeds. A run is a process of its own, so
that its peak memory is its own. It is written to the results when it ends, and not repeated; a method that cannot
run is there with its error (``--retry`` tries those again).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import methods_table
from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from recipes import assets

FULL, HEAD_ONLY = "full fine-tuning", "head only"
REPLACED = ("full",)
"""Names of the registry that stand below under others."""
VARIANTS = {
    FULL: "full(targets='all')",
    "lora r=2": "lora(rank=2, alpha=4)",
    "rslora": "lora(rslora=true)",
    "lora-pissa": "lora(init='pissa')",
    "lora-olora": "lora(init='olora')",
    "lora-orthogonal": "lora(init='orthogonal')",
    "lora-gaussian": "lora(init='gaussian')",
    "lora-eva": "lora(init='eva')",
    "lora-ga": "lora(init='lora_ga')",
}
"""Name of a row -> method; added to those of the registry."""
RATES = {HEAD_ONLY: 1e-2}
"""Learning rates in the place of a default: that of full training is for whole models, not for a new head."""
MOST_USED = (
    FULL, "lora", "lora r=2", "rslora", "lora-pissa", "dora", "adalora", "vera", "ia3", "bitfit", "bottleneck",
    "prefix", "prompt",
)  # fmt: skip
SECONDS = 1200
"""After which a run is given up."""


@dataclass(frozen=True)
class Bench:
    """One model and task. ``rows`` are counts: to learn from, to choose the rate by, to report on."""

    name: str
    title: str
    what: str
    factors: tuple[float, ...]
    rows: tuple[int, int, int]
    recipe: Mapping[str, Any]

    @property
    def classifies(self) -> bool:
        """Whether texts are given a label by a head, and not by an answer."""
        return self.recipe.get("task") == "sequence-classification"

    def settings(self) -> dict[str, Any]:
        """What runs must share to be compared."""
        return json.loads(json.dumps({**asdict(self), "recipe": dict(self.recipe)}))


COMMON = {
    "dtype": "bfloat16",
    "checkpoint": {"every": 10**6, "keep": 1},
    "eval": {"samples": 0},
}
MINILM = Bench(
    "minilm",
    "MiniLM, sarcastic headlines",
    "all-MiniLM-L6-v2 (22.7 M) tells sarcastic headlines from plain ones",
    factors=(1.0, 3.0, 10.0),
    rows=(640, 200, 500),
    recipe={
        **COMMON,
        "task": "sequence-classification",
        "data": {"max_tokens": 64, "too_long": "right"},
        "epochs": 2,
        "batch": {"size": 16},
        "optim": {"schedule": "linear", "warmup": 0.1},
    },
)
SMOLLM2 = Bench(
    "smollm2",
    "SmolLM2-135M, film reviews",
    "SmolLM2-135M-Instruct answers whether a film review is positive",
    factors=(1 / 3, 1.0, 3.0),
    rows=(240, 64, 200),
    recipe={
        **COMMON,
        "batch": {"size": 8},
        "optim": {"schedule": "cosine", "warmup": 0.1},
    },
)
BENCHES = {bench.name: bench for bench in (MINILM, SMOLLM2)}


@dataclass(frozen=True)
class Job:
    """One run: a method by its ``name`` in the table and as text, a learning rate and a seed."""

    bench: str
    name: str
    method: str
    factor: float
    seed: int


Measure = Callable[[Job, Bench], dict[str, Any]]
"""Runs a job; the numbers, or ``error`` (the method refused) or ``crash`` (it failed)."""


def methods_of(bench: Bench) -> dict[str, str]:
    """Name -> method, in the order in which they are run."""
    import trimtab as tt

    found = {FULL: VARIANTS[FULL]}
    if bench.classifies:
        found[HEAD_ONLY] = "full(targets=('head',))"
    found |= {name: name for name in tt.methods() if name not in REPLACED}
    found |= {name: name for name in _presets()}
    found |= VARIANTS
    if bench.classifies:
        return found
    return {name: found.get(name, name) for name in MOST_USED}


def _presets() -> Sequence[str]:
    from trimtab.adapt.parse import PRESETS

    return tuple(PRESETS)


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


# -- a run -----------------------------------------------------------------------------------------


def one(job: Job, rows: tuple[int, int, int], out: Path) -> dict[str, Any]:
    """Train once, in this process, and measure."""
    from rich.console import Console

    from trimtab.adapt.parse import method_from
    from trimtab.engine import Engine
    from trimtab.errors import TrimtabError
    from trimtab.evals import evaluate
    from trimtab.train.recipe_file import make_recipe
    from trimtab.train.run import Run
    from trimtab.train.screen import Screen
    from trimtab.train.setup import opened_base
    from trimtab.train.sources import read_examples_of

    bench = BENCHES[job.bench]
    model, (train, choose, report) = _files(bench, rows)
    try:
        lr = RATES.get(job.name, method_from(job.method).lr) * job.factor
        given = make_recipe(
            {**bench.recipe, "model": str(model), "method": job.method, "seed": job.seed, "out": str(out)},
            {"data.path": str(train), "data.held_out": str(choose), "optim.lr": lr},
        )  # fmt: skip
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
        "lr": lr,
        **_facts(out),
        "choosing_loss": outcome.after.held_out.loss.value,
        "loss": asdict(found.held_out.loss),
        "accuracy": asdict(found.metrics["choice"]),
        "bytes": sum(file.stat().st_size for file in (out / "adapter").iterdir()),
        **({"drift": drift(base, adapter.name)} if bench.classifies else {}),
    }


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
        "tokens_per_second": steps[-1]["tokens"] / sum(step["seconds"] for step in steps),
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


def _files(bench: Bench, rows: tuple[int, int, int]) -> tuple[Path, list[Path]]:
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


def in_process(job: Job, bench: Bench) -> dict[str, Any]:
    """Run a job in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        call = json.dumps([asdict(job), bench.rows, f"{scratch}/run"])
        try:
            said = subprocess.run(
                [sys.executable, "-m", "benchmarks.methods", "--one", call],
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
) -> dict[str, Any]:
    """All runs of a bench that are not in the results yet; each is written as it ends."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mine = found.setdefault(bench.name, {"settings": bench.settings(), "runs": []})
    if mine["runs"] and mine["settings"] != bench.settings():
        raise SystemExit(
            f"{path} was measured with other settings of {bench.name}; remove them from it to measure anew."
        )
    mine |= {"settings": bench.settings(), "machine": machine()}
    if retry:
        mine["runs"] = [one for one in mine["runs"] if not {"error", "crash"} & one.keys()]
    for job in _jobs(bench, mine["runs"], only):
        entry = {**asdict(job), **measure(job, bench), "commit": commit()}
        mine["runs"].append(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        print(methods_table.line(entry), flush=True)
    return found


def _jobs(bench: Bench, runs: list[dict[str, Any]], only: Sequence[str]) -> Iterator[Job]:
    """What is left to do; ``runs`` grows while they are done."""
    known = methods_of(bench)
    if unknown := [name for name in only if name not in known]:
        raise SystemExit(
            f"{bench.name} has no method {unknown[0]!r}; there are: {', '.join(known)}"
        )
    for name in only or known:
        while (job := next_job(bench, name, known[name], runs)) is not None:
            yield job


def main(argv: list[str]) -> int:
    """Measure; write JSON, Markdown and the pictures."""
    parser = argparse.ArgumentParser(prog="methods")
    parser.add_argument("--bench", nargs="+", choices=tuple(BENCHES), default=[*BENCHES])
    parser.add_argument("--only", nargs="+", default=(), metavar="METHOD", help="of one bench")
    parser.add_argument("--retry", action="store_true", help="run what failed again")
    parser.add_argument("--rows", nargs=3, type=int, metavar=("LEARN", "CHOOSE", "REPORT"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        values, rows, out = json.loads(options.one)
        print(json.dumps(one(Job(**values), tuple(rows), Path(out))))
        return 0
    path = options.out / "methods.json"
    for name in options.bench:
        bench = BENCHES[name]
        if options.rows:
            bench = Bench(**{**vars(bench), "rows": tuple(options.rows)})
        run(path, bench, only=options.only, retry=options.retry)
    methods_table.write(options.out, json.loads(path.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
