"""A QLoRA training step beside the same step on a bf16 base, and beside PEFT with bitsandbytes.

    nf4      Trimtab, the base stored as NF4 with double quantisation
    bf16     Trimtab, the base in bf16
    peft     peft and bitsandbytes, as QLoRA's users write it (bf16 products; autocast, AdamW)

The step is that of `benchmarks.lora_step`, its sides too. It needs bitsandbytes: the peer's side is made of it, and
ours unpacks with it (``--plain`` leaves it out of our side).

    python -m benchmarks qlora_step
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import core, lora_step, steps
from benchmarks.core import Sample, Side, Spread
from benchmarks.lora_step import LOSS_TOLERANCE, Work

NF4, BF16, PEER = "nf4", "bf16", "peft"
NOTES = (
    "tokens/s counts the tokens the model sees; ratios are medians of the ratios within each round",
    "peak memory: high-water mark of the whole process's resident memory in a measured step; the file that weights "
    "were read from is mapped, and counts while its pages are resident",
    "peft: prepare_model_for_kbit_training is not called, because it would make norms, embeddings and the head fp32",
    "allocator `tuned`: MALLOC_MMAP_MAX_=0 and a MALLOC_TRIM_THRESHOLD_ never reached, on all sides",
)


class Plain(lora_step.Trimtab):
    """Our side without bitsandbytes."""

    def __init__(self, **options: Any) -> None:
        core.hide_bitsandbytes()
        super().__init__(**options)


def sides(work: Work, plain: bool) -> list[Side]:
    """Ours, stored and dense, and the peer's."""
    ours = "benchmarks.qlora_step:Plain" if plain else "benchmarks.lora_step:Trimtab"
    stored = asdict(replace(work, storage="nf4"))
    return [
        Side(NF4, ours, stored),
        Side(BF16, ours, asdict(work)),
        Side(PEER, "benchmarks.lora_step:Peft", stored),
    ]


def measure(made: Sequence[Side], allocator: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report. Raises `SideError` where two NF4 sides compute different losses."""
    with core.workers(made, allocator, options.threads) as running:
        facts = running[BF16].call("facts")
        samples = steps.take_turns(running, options, _say)
    losses = {
        side.name: [s.result["loss"] for s in samples if s.side == side.name] for side in made
    }
    apart = max(abs(a - b) / b for a, b in zip(losses[NF4], losses[PEER], strict=True))
    if not apart < LOSS_TOLERANCE:
        raise core.SideError(f"the losses disagree by {apart:.3f}: {losses}")
    found: dict[str, Any] = {"allocator": allocator, **facts, "loss_apart": apart, "sides": {}}
    for side in made:
        own = core.of_side(samples, side.name)
        found["sides"][side.name] = {
            "rate": Spread.of(sample.rate for sample in own),
            "peak_gb": Spread.of(sample.peak_bytes / 1e9 for sample in own),
        }
    for other in (BF16, PEER):
        found[f"speed_over_{other}"] = core.ratio(samples, NF4, other, lambda s: s.rate)
        found[f"memory_over_{other}"] = core.ratio(samples, NF4, other, lambda s: s.peak_bytes)
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    found["samples"] = list(samples)
    return found


def _say(sample: Sample) -> None:
    print(
        f"  step {sample.step:>2} {sample.side:<8} {sample.seconds:6.2f} s {sample.rate:7.1f} tok/s "
        f"{sample.peak_bytes / 1e9:5.2f} GB  others {sample.others:4.0%}",
        flush=True,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = ["| allocator | side | tokens/s | peak memory, GB |", "|---|---|---|---|"]
    for row in rows:
        for name, side in row["sides"].items():
            lines.append(
                f"| {row['allocator']} | {name} | {side['rate'].text(0)} | {side['peak_gb'].text()} |"
            )
        for other in (BF16, PEER):
            speed, memory = row[f"speed_over_{other}"], row[f"memory_over_{other}"]
            lines.append(
                f"| {row['allocator']} | **nf4 / {other}** | **{speed.text()}** | **{memory.text()}** |"
            )
    lines.append("")
    for row in rows:
        lines.append(
            f"- {row['allocator']}: losses of the NF4 sides differ by at most {row['loss_apart']:.2%} in any step; "
            f"other processes took {row['others'].text(0, 100)} % of the CPU time in the counted rounds"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    """Measure and write the report."""
    parser = steps.parser("qlora_step", __doc__)
    steps.add_model(parser)
    parser.add_argument("--plain", action="store_true", help="our side without bitsandbytes")
    options = parser.parse_args(argv)
    work = Work(steps.model_folder(options.model), options.rows, options.tokens, options.rank)
    rows = steps.measured(
        "qlora_step", options, lambda how: measure(sides(work, options.plain), how, options)
    )
    name = f"qlora_step{'_plain' if options.plain else ''}"
    title = (
        f"QLoRA r={work.rank} on all linear layers of {Path(work.model).name}, {work.rows} × {work.tokens} random "
        f"tokens, {options.threads} threads, {'without' if options.plain else 'with'} bitsandbytes on our side"
    )
    version = metadata.version("bitsandbytes")
    stored = replace(work, storage=NF4)
    steps.write(name, title, stored, options, rows, table(rows), NOTES, bitsandbytes=version)
    return 0
