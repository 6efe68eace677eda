"""Training steps beside the plain LoRA step: other methods, and LoRA with its blocks computed again for backward.

    recompute    LoRA; the peer with gradient checkpointing, Trimtab keeping all, or computing MLPs or blocks again
    dora         weight-decomposed LoRA on all linear layers
    ia3          three vectors a block
    prefix       trained keys and values before every attention
    bottleneck   adapters after the MLPs, which PEFT does not have; beside our own LoRA

Model, tokens and loop are those of `benchmarks.lora_step`; so is what is counted.

    python -m benchmarks other_steps                  measure all
    python -m benchmarks other_steps --parts dora     measure some; the others stay as they were in the report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import core, lora_step, report, steps
from benchmarks.bars import bars
from benchmarks.core import Side, Spread
from benchmarks.lora_step import ADAPTER, LOSS_TOLERANCE, OURS

PEFT = "peft"
LORA = "trimtab, LoRA"
LENGTH = 30
NOTES = (
    *lora_step.NOTES[:2],
    "allocator `default`: glibc as it comes, on both sides",
    "recompute: gradient checkpointing as `gradient_checkpointing_enable(use_reentrant=False)` gives it; the blocks of "
    "Trimtab are recomputed in the same way, its MLPs by themselves",
    f"prefix: {LENGTH} positions; bottleneck: pfeiffer(size=64)",
)


@dataclass(frozen=True)
class Work(lora_step.Work):
    """What one step is; ``method`` is Trimtab's text of it."""

    method: str = ""
    recompute: str = "none"


class Trimtab(lora_step.Trimtab):
    """Our side: the engine's verbs."""

    work: Work

    def __init__(self, **options: Any) -> None:
        import trimtab as tt
        from trimtab.engine import Engine
        from trimtab.optim.params import AdamParams, Memory

        self.work = work = Work(**options)
        base = tt.load(work.model, dtype=torch.bfloat16, device="cpu")
        self.model = base.model
        tt.attach(base.model, tt.method(work.method), name=ADAPTER)
        _fill(self)
        self.engine = Engine(base, memory=Memory(recompute=work.recompute))  # type: ignore[arg-type]
        self.adam = AdamParams(lr=work.lr, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=None)


class Peft(lora_step.Peft):
    """The peer's side: the plain loop."""

    work: Work

    def __init__(self, **options: Any) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        self.work = work = Work(**options)
        base = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16)
        base.config.use_cache = False
        lora = {"r": work.rank, "lora_alpha": 2 * work.rank, "target_modules": "all-linear"}
        config = {
            "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", **lora),
            "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **lora),
            "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
            "prefix": lambda: peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=LENGTH
            ),
        }[work.method.partition("(")[0]]()
        self.model = peft.get_peft_model(base, config, adapter_name=ADAPTER)
        self.model.train()
        if work.recompute != "none":
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        _fill(self)
        trained = [parameter for _, parameter in self.factors()]
        self.optimiser = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0)


def _fill(side: lora_step._Lora) -> None:
    """LoRA's factors, equal on both sides; what other methods begin with is theirs."""
    factors = [(n, p) for n, p in side.factors() if ".lora_" in n and p.dim() == 2]
    side.factors, found = lambda: iter(factors), side.factors  # type: ignore[method-assign]
    side.fill()
    side.factors = found  # type: ignore[method-assign]


PARTS = ("recompute", "dora", "ia3", "prefix", "bottleneck")


def sides(part: str, work: Work) -> list[Side]:
    """Those of one part; the first is ours."""
    lora = f"lora(rank={work.rank}, alpha={2 * work.rank})"
    texts = {
        "recompute": lora,
        "dora": f"dora(rank={work.rank}, alpha={2 * work.rank})",
        "ia3": "ia3",
        "prefix": f"prefix(length={LENGTH})",
        "bottleneck": "pfeiffer(size=64)",
    }
    own = replace(work, method=texts[part])

    def side(name: str, kind: str, **changes: str) -> Side:
        return Side(name, f"{__name__}:{kind}", asdict(replace(own, **changes)))

    if part == "recompute":
        again = [side(f"{OURS}, {what}", "Trimtab", recompute=what) for what in ("mlp", "blocks")]
        return [side(OURS, "Trimtab"), *again, side(PEFT, "Peft", recompute="blocks")]
    peer = [] if part == "bottleneck" else [side(PEFT, "Peft")]
    return [side(OURS, "Trimtab"), *peer, side(LORA, "Trimtab", method=lora)]


def measure(part: str, work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """One part. Raises `SideError` where the losses of two sides that compute the same disagree."""
    made = sides(part, work)
    with core.workers(made, options.allocator[0], options.threads) as running:
        facts = running[OURS].call("facts")
        samples = steps.take_turns(running, options, lora_step._say)
    losses = {s.name: [x.result["loss"] for x in samples if x.side == s.name] for s in made}
    same = [s.name for s in made if s.name != LORA and part != "prefix"]
    for name in same:
        pairs = zip(losses[OURS], losses[name], strict=True)
        if not max(abs(a - b) / b for a, b in pairs) < LOSS_TOLERANCE:
            raise core.SideError(f"{part}: the losses disagree: {losses}")
    against = PEFT if any(s.name == PEFT for s in made) else LORA
    found: dict[str, Any] = {
        "part": part,
        **facts,
        "against": against,
        "losses": losses,
        "sides": {},
    }
    for name in losses:
        own = core.of_side(samples, name)
        found["sides"][name] = {
            "rate": Spread.of(s.rate for s in own),
            "peak_gb": Spread.of(s.peak_bytes / 1e9 for s in own),
            "speed": core.ratio(samples, name, against, lambda s: s.rate),
            "memory": core.ratio(samples, name, against, lambda s: s.peak_bytes),
        }
    if part == "dora":
        found["of_lora"] = core.ratio(samples, OURS, LORA, lambda s: s.rate)
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    found["samples"] = list(samples)
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "![tokens per second](other_steps.svg)",
        "",
        "| | side | tokens/s | × | peak memory, GB | × | beside |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, side in row["sides"].items():
            speed = f"{side['rate'].text(0)} | {side['speed'].text()}"
            memory = f"{side['peak_gb'].text()} | {side['memory'].text()}"
            lines.append(f"| {row['part']} | {name} | {speed} | {memory} | {row['against']} |")
        if "of_lora" in row:
            lines.append(
                f"| {row['part']} | speed beside our own LoRA | | {row['of_lora'].text()} | | | |"
            )
    lines.append("")
    for row in rows:
        lines.append(
            f"- {row['part']}: {row['of']}; {row['trained']:,} parameters trained; other processes took "
            f"{row['others'].text(0, 100)} % of the CPU time in the counted rounds"
        )
    return lines


def _before(folder: Path) -> dict[str, Any]:
    """What the report there holds, by part."""
    file = folder / "other_steps.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    at_once = f"{found['date']}, commit {found['commit']}, {found['work']['rounds']} rounds"
    return {row["part"]: {"of": at_once, **core.spreads(row)} for row in found["rows"]}


def main(argv: Sequence[str]) -> int:
    """Measure and write the report and its picture."""
    parser = steps.parser("other_steps", __doc__)
    steps.add_model(parser)
    parser.set_defaults(allocator=["default"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(argv)
    work = Work(steps.model_folder(options.model), options.rows, options.tokens, options.rank)
    rows = _before(Path(options.out))
    for part in options.parts:
        print(f"other_steps, {part}", flush=True)
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        of = f"{date}, commit {report.commit()}, {options.rounds} rounds"
        rows[part] = {**measure(part, work, options), "of": of}
    found = [rows[part] for part in PARTS if part in rows]
    title = (
        f"Steps of other methods and with recomputation, {Path(work.model).name}, bf16, {work.rows} × {work.tokens} "
        f"random tokens, {options.threads} threads"
    )
    steps.write("other_steps", title, work, options, found, table(found), NOTES)
    groups = {
        row["part"]: {
            n: (s["rate"].median, f"{s['rate'].median:.0f} tokens/s")
            for n, s in row["sides"].items()
        }
        for row in found
    }
    Path(options.out, "other_steps.svg").write_text(bars(groups, ours=OURS), encoding="utf-8")
    return 0
