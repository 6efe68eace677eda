"""Many adapters trained on one base: a small micro-batch for each of them, computed together or one after another.

    together     one `Engine.forward_backward` over the data of all adapters, then `Engine.optim_step` for each
    by turns     the same engine, one adapter after another
    peft         the plain loop of one adapter, as often as there are adapters (each of its jobs has one)
    peft, rows   the same loop once, over as many rows
    one, rows    our engine with one adapter over as many rows: what `together` is compared with in memory

A step is one micro-batch of ``tokens`` random tokens for each of ``adapters``, and a step of each optimiser. Weights,
tokens, first factors (B not zero) and AdamW are the same on all sides; the learning rate is so small that the losses of
one adapter that learns from all data and of many that learn from some stay comparable.

    python -m benchmarks many_train
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import core, lora_step, steps
from benchmarks.core import Side, Spread

TOGETHER, TURNS, PEFT, ROWS = "trimtab, together", "trimtab, by turns", "peft", "peft, rows"
ONE = "trimtab, one, rows"
NOTES = (
    lora_step.NOTES[1],
    "tokens/s counts the tokens of all adapters' micro-batches; ratios are medians of the ratios within each round",
    "peft: one adapter in the model, which steps as often as there are adapters; its jobs, one after another, would "
    "each load the model as well",
    "peft, rows, and trimtab, one, rows: one adapter and one step over as many rows as there are adapters: equal "
    "tokens in memory at once",
    "states: tensors and moments of all adapters but one, in fp32; their gradients, as large as the tensors, are not "
    "taken off",
)


@dataclass(frozen=True)
class Work(lora_step.Work):
    """What one step is; ``rows`` are the adapters, and ``together`` whether their data are seen at once."""

    together: bool = True
    adapters: int = 16
    """Each learns from as many rows as the others."""


def _names(work: Work) -> list[str]:
    return [f"a{number:02}" for number in range(work.adapters)]


class Trimtab(lora_step.Trimtab):
    """Our side, with any number of adapters."""

    work: Work

    def __init__(self, **options: Any) -> None:
        import trimtab as tt
        from trimtab.engine import Engine
        from trimtab.optim.params import AdamParams

        self.work = work = Work(**options)
        base = tt.load(work.model, dtype=torch.bfloat16, device="cpu")
        self.model = base.model
        for name in _names(work):
            tt.attach(base.model, tt.LoRA(rank=work.rank, alpha=2.0 * work.rank), name=name)
        self.fill()
        self.engine = Engine(base)
        self.adam = AdamParams(lr=work.lr, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=None)

    @torch.no_grad()
    def fill(self) -> None:
        """The same in all adapters, and on all sides."""
        for path, parameter in self.factors():
            parts = path.split(".")
            name = ".".join("default" if part in _names(self.work) else part for part in parts)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.work.seed)
            scale = 0.01 if ".lora_B." in name else parameter.shape[1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def step(self, number: int) -> dict[str, Any]:
        from trimtab.data import Datum

        ids = self.work.batch(number, self.model.config.vocab_size).tolist()
        weights = (*(1.0,) * (self.work.tokens - 1), 0.0)
        data, names = [Datum(tuple(r), (*r[1:], 0), weights) for r in ids], _names(self.work)
        if self.work.together:
            loss = self.engine.forward_backward(data, names * (len(data) // len(names))).mean
            for name in names:
                self.engine.optim_step(name, self.adam)
            return self.result(loss)
        losses = []
        for datum, name in zip(data, names, strict=True):
            losses.append(self.engine.forward_backward([datum], name).mean)
            self.engine.optim_step(name, self.adam)
        return self.result(sum(losses) / len(losses))


class Peft(lora_step.Peft):
    """The peer's side: one adapter, row by row or over all rows at once."""

    def __init__(self, **options: Any) -> None:
        self.together = options.pop("together")
        options.pop("adapters")
        super().__init__(**options)

    def step(self, number: int) -> dict[str, Any]:
        ids = self.work.batch(number, self.model.config.vocab_size)
        losses = []
        for rows in ids.split(len(ids) if self.together else 1):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.model(input_ids=rows, labels=rows).loss
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return self.result(sum(losses) / len(losses))


def sides(work: Work) -> list[Side]:
    """Ours, both ways, and the peer's."""
    apart, one = replace(work, together=False), replace(work, adapters=1)
    chosen = {
        TOGETHER: ("Trimtab", work), TURNS: ("Trimtab", apart), ONE: ("Trimtab", one),
        PEFT: ("Peft", apart), ROWS: ("Peft", work),
    }  # fmt: skip
    return [Side(name, f"{__name__}:{kind}", asdict(how)) for name, (kind, how) in chosen.items()]


def measure(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Speeds and memory. Raises `SideError` where the losses of two sides disagree."""
    with core.workers(sides(work), options.allocator[0], options.threads) as running:
        facts = running[TOGETHER].call("facts")
        samples = steps.take_turns(running, options, lora_step._say)
    losses = {name: [s.result["loss"] for s in samples if s.side == name] for name in running}
    for name, own in losses.items():
        pairs = zip(losses[TOGETHER], own, strict=True)
        if not max(abs(a - b) / b for a, b in pairs) < lora_step.LOSS_TOLERANCE:
            raise core.SideError(f"the losses of {name} disagree: {losses}")
    others = facts["trained"] * (work.adapters - 1) // work.adapters
    states = 3 * 4 * others / 1e9  # fp32: the tensors, and two moments for each
    found: dict[str, Any] = {**facts, "losses": losses, "states_gb": states, "sides": {}}
    for name in losses:
        own_samples = core.of_side(samples, name)
        found["sides"][name] = {
            "rate": Spread.of(s.rate for s in own_samples),
            "peak_gb": Spread.of(s.peak_bytes / 1e9 for s in own_samples),
            "speed": core.ratio(samples, TOGETHER, name, lambda s: s.rate),
            "memory": core.ratio(samples, TOGETHER, name, lambda s: s.peak_bytes),
        }
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    found["samples"] = list(samples)
    return found


def table(row: dict[str, Any]) -> list[str]:
    """Markdown: what ``together`` is times as fast as, and its share of the memory."""
    lines = [
        f"| side | tokens/s | {TOGETHER}: × as fast | peak memory, GB | {TOGETHER}: × the memory |",
        "|---|---|---|---|---|",
    ]
    for name, side in row["sides"].items():
        speed = f"{side['rate'].text(0)} | {side['speed'].text()}"
        lines.append(f"| {name} | {speed} | {side['peak_gb'].text()} | {side['memory'].text()} |")
    others = f"other processes took {row['others'].text(0, 100)} % of the CPU time"
    together, one = (row["sides"][name]["peak_gb"].median for name in (TOGETHER, ONE))
    states = row["states_gb"]
    return [
        *lines,
        "",
        f"- without the {states:.2f} GB of the other adapters' states, {TOGETHER} has {(together - states) / one:.2f} "
        f"times the memory of {ONE}",
        f"- {row['trained']:,} parameters trained; {others} in the counted rounds",
    ]


def main(argv: Sequence[str]) -> int:
    """Measure and write the report."""
    parser = steps.parser("many_train", __doc__, rows=16, tokens=128)
    steps.add_model(parser)
    parser.set_defaults(allocator=["default"], rank=8)
    options = parser.parse_args(argv)
    model = steps.model_folder(options.model)
    work = Work(model, options.rows, options.tokens, options.rank, lr=1e-6, adapters=options.rows)
    row = measure(work, options)
    title = (
        f"{work.rows} LoRA adapters on {Path(model).name}, bf16, 1 × {work.tokens} random tokens for each, "
        f"{options.threads} threads"
    )
    steps.write("many_train", title, work, options, [row], table(row), NOTES)
    return 0
