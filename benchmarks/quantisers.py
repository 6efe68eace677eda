"""What rounding a base to few bits costs: MiniLM's real fp32 weights, and SmolLM2's perplexity.

For each format: the bits a weight takes; how far weights and what layers give lie from fp32 (relative, Frobenius; the
layers' inputs are those of real headlines); how well LoRA on that base tells sarcastic headlines (the task, rows and
steps of `benchmarks.methods`, two seeds); and, as a second view, the perplexity of SmolLM2-135M on a plain text.
SmolLM2's weights, as the package ships them, lie on a grid of 4 bits already: its errors say less.

    python -m benchmarks quantisers             (minutes)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.core import ROOT
from benchmarks.methods_benches import MINILM, Job
from benchmarks.methods_run import files, recipe_of
from benchmarks.report import commit, machine
from recipes import assets

FORMATS = ("fp32", "int8", "fp8", "nf4", "fp4")
LABELS = ("plain", "sarcastic")
METHOD, FACTOR = "lora", 10.0
"""And the rate that was best for it, as a factor of the default."""


def errors(storage: str) -> dict[str, Any]:
    """Of each linear layer of MiniLM: weights and outputs, relative to fp32."""
    import trimtab as tt
    from trimtab.frozen import view
    from trimtab.frozen.lowbit import LowBitLinear

    given: dict[str, Any] = {
        "dtype": torch.float32, "device": "cpu", "task": "sequence-classification", "labels": LABELS
    }  # fmt: skip
    dense = tt.load(assets.minilm(), **given)
    small = tt.load(assets.minilm(), **given, storage=storage)
    _, (_, _, report) = files(MINILM, MINILM.rows)
    texts = [json.loads(line)["text"] for line in report.read_text("utf-8").splitlines()[:32]]
    inputs = dense.tokenizer(
        texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    layers = {n: m for n, m in small.model.named_modules() if isinstance(m, LowBitLinear)}
    with torch.no_grad(), _seen(dense.model, layers) as seen:
        dense.model(**inputs)
    found: dict[str, Any] = {"bits": statistics.mean(m.bits for m in layers.values()), "layers": {}}
    for name, module in layers.items():
        layer = view(dense.model.get_submodule(name))
        assert layer is not None
        exact, rounded = layer.dense(), module.dense(torch.float32)
        x = seen[name].flatten(0, -2)
        found["layers"][name] = {
            "weight": _relative(rounded, exact),
            "output": _relative(x @ rounded.T, x @ exact.T),
        }
    return found


@contextmanager
def _seen(model: nn.Module, names: Any) -> Iterator[dict[str, Tensor]]:
    """What enters these layers meanwhile."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: found.update({name: args[0].detach()})

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _relative(rounded: Tensor, exact: Tensor) -> float:
    return float((rounded - exact).norm() / exact.norm())


def learnt(storage: str | None, seed: int, folder: Path) -> dict[str, Any]:
    """LoRA on the task with the base so stored: accuracy and loss on rows that nothing was chosen by."""
    from dataclasses import asdict

    from rich.console import Console

    from trimtab.engine import Engine
    from trimtab.evals import evaluate
    from trimtab.train.run import Run
    from trimtab.train.screen import Screen
    from trimtab.train.setup import opened_base
    from trimtab.train.sources import read_examples_of

    model, (train, choose, report) = files(MINILM, MINILM.rows)
    job = Job("minilm", METHOD, METHOD, FACTOR, seed)
    given = recipe_of(
        MINILM, job, folder, model, train,
        {"data.held_out": str(choose), "dtype": "float32", "storage": storage},
    )  # fmt: skip
    recipe, base, adapter = opened_base(given)
    Run(recipe, base, adapter, Screen(Console(quiet=True)), resume=False).go()
    data, _ = read_examples_of(
        recipe.data.replace(path=str(report)), base.tokenizer,
        Engine(base).context(adapter.name), held_out=False, task=recipe.task,
    )  # fmt: skip
    (found,) = evaluate(base, data, [adapter.name], metrics=["choice"], max_tokens=5)
    assert found.held_out is not None
    return {
        "seed": seed,
        "accuracy": asdict(found.metrics["choice"]),
        "loss": asdict(found.held_out.loss),
    }


def perplexity(storage: str | None) -> dict[str, Any]:
    """Of SmolLM2 on the text that Trimtab brings; weights and products otherwise in fp32."""
    from dataclasses import asdict

    import trimtab as tt
    from trimtab.engine import Engine
    from trimtab.evals.forgetting import forgetting, general_text, paragraphs

    base = tt.load(assets.smollm2(), dtype=torch.float32, device="cpu", storage=storage)  # type: ignore[arg-type]
    found = forgetting(Engine(base), paragraphs(general_text(), base.tokenizer), None)
    return asdict(found.perplexity)


def run() -> dict[str, Any]:
    """Everything, in this process."""
    found: dict[str, Any] = {"machine": machine(), "commit": commit(), "formats": {}}
    for name in FORMATS:
        storage = None if name == "fp32" else name
        entry: dict[str, Any] = errors(storage) if storage else {"bits": 32.0, "layers": {}}
        entry["runs"] = []
        for seed in (0, 1):
            with tempfile.TemporaryDirectory() as scratch:
                entry["runs"].append(learnt(storage, seed, Path(scratch) / "run"))
        entry["perplexity"] = perplexity(storage)
        found["formats"][name] = entry
        print(name, entry["bits"], entry["runs"], entry["perplexity"], flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What rounding a base to few bits costs",
        "",
        f"Errors are relative to fp32 (Frobenius), mean and worst of MiniLM's {_count(found)} linear layers; "
        f"accuracy is that of LoRA on the base so stored ({MINILM.what}; {MINILM.rows[2]} rows, two seeds, each with "
        "95 % interval); perplexity is that of SmolLM2-135M-Instruct on a plain text. "
        f"{found['machine']['cpu']}, commit {found['commit']}. Made by `python -m benchmarks quantisers`.",
        "",
        "| format | bits a weight | error of weights, mean (worst) | error of outputs, mean (worst) | accuracy | "
        "held-out loss | perplexity, SmolLM2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in found["formats"].items():
        right = [run["accuracy"] for run in entry["runs"]]
        spans = ", ".join(
            f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in right
        )
        loss = statistics.mean(run["loss"]["value"] for run in entry["runs"])
        mean = statistics.mean(one["value"] for one in right)
        lines.append(
            f"| {name} | {entry['bits']:.2f} | {_spread(entry, 'weight')} | {_spread(entry, 'output')} "
            f"| **{mean:.3f}**: {spans} | {loss:.4f} | {entry['perplexity']['value']:.2f} |"
        )
    lines += ["", "Error of weights by kind of layer, mean over the blocks:", ""]
    kinds = sorted({_kind(n) for e in found["formats"].values() for n in e["layers"]})
    lines += [
        f"| layer | {' | '.join(n for n in FORMATS[1:])} |",
        "|---|" + "---|" * len(FORMATS[1:]),
    ]
    for kind in kinds:
        cells = []
        for name in FORMATS[1:]:
            own = [
                v["weight"] for n, v in found["formats"][name]["layers"].items() if _kind(n) == kind
            ]
            cells.append(f"{statistics.mean(own):.4f}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _kind(name: str) -> str:
    """A layer's name without its block."""
    return ".".join(part for part in name.split(".")[-3:] if not part.isdigit())


def _count(found: dict[str, Any]) -> int:
    return max(len(entry["layers"]) for entry in found["formats"].values())


def _spread(entry: dict[str, Any], what: str) -> str:
    values = [layer[what] for layer in entry["layers"].values()]
    return f"{statistics.mean(values):.4f} ({max(values):.4f})" if values else "–"


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="quantisers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    found = run()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quantisers.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "quantisers.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
