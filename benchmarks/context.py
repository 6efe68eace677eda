"""Memory of a LoRA step against the context: one document of 512 to 8,192 tokens, in bf16.

    python -m benchmarks context

The sides are those of `lora_step`, each alone on the machine, in a process of its own: with everything kept for
backward, and with every block recomputed. What one more token costs is the slope of a line through the peaks; what the
process needs besides (weights, libraries, optimiser) is its intercept. Memory does not depend on how busy a machine is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import core, lora_step, steps
from benchmarks.core import Side
from benchmarks.lines import each, lines, slope
from benchmarks.lora_step import OURS, PEER, Work
from benchmarks.report import commit, machine

LENGTHS = (512, 1024, 2048, 4096, 8192)
WAYS = {False: "everything kept", True: "blocks recomputed"}


class Trimtab(lora_step.Trimtab):
    """Ours; ``recompute`` every block, or nothing."""

    def __init__(self, recompute: bool, lengths: Sequence[int], **options: Any) -> None:
        from trimtab.optim.params import Memory

        super().__init__(**options)
        self._lengths = lengths
        self.engine.micro_tokens = max(lengths)
        self.engine.memory = Memory(recompute="blocks" if recompute else "none")

    def step(self, number: int) -> dict[str, Any]:
        self.work = replace(self.work, tokens=self._lengths[number])
        return super().step(number)


class Peft(lora_step.Peft):
    """The peer's."""

    def __init__(self, recompute: bool, lengths: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self._lengths = lengths
        if recompute:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(self, number: int) -> dict[str, Any]:
        self.work = replace(self.work, tokens=self._lengths[number])
        return super().step(number)


def measure(
    work: Work, recompute: bool, allocator: str, threads: int, lengths: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """For each side its steps, from the shortest to the longest; it ends where a side fails."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, kind in ((OURS, "Trimtab"), (PEER, "Peft")):
        options = {**asdict(work), "recompute": recompute, "lengths": [lengths[0], *lengths]}
        found[name] = []
        with core.workers(
            [Side(name, f"{__name__}:{kind}", options)], allocator, threads
        ) as running:
            for number, tokens in enumerate(options["lengths"]):
                try:
                    sample = running[name].step(number)
                except core.SideError as error:
                    found[name].append({"tokens": tokens, "error": str(error)[-300:]})
                    break
                print(
                    f"{name}, {WAYS[recompute]}, {tokens}: {sample.peak_bytes / 1e9:.2f} GB",
                    flush=True,
                )
                if number:  # the first makes the optimiser's state
                    peak = {"tokens": tokens, "peak_bytes": sample.peak_bytes}
                    found[name].append(
                        {**peak, "seconds": sample.seconds, "loss": sample.result["loss"]}
                    )
    return found


def points(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(tokens, GB) of the steps that were done."""
    return [(row["tokens"], row["peak_bytes"] / 1e9) for row in rows if "peak_bytes" in row]


def per_token(rows: Sequence[dict[str, Any]]) -> float:
    """Bytes that one more token costs."""
    return 1e9 * each(points(rows))


def table(found: dict[str, Any]) -> str:
    """The report."""
    about, lengths = found["work"], [f"{length:,}" for length in found["lengths"]]
    lines_of = [
        f"# Memory against context: LoRA r={about['rank']} on all linear layers of {about['model']}, bf16",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores; commit {found['commit']}; allocator "
        f"{found['allocator']} on both sides. Made by `python -m benchmarks context`.",
        "",
        "![memory by tokens](context.svg)",
        "",
        f"| | {' | '.join(lengths)} | bytes a token | growth |",
        f"|---|{'---|' * (len(lengths) + 2)}",
    ]
    for way, sides in found["ways"].items():
        for side, rows in sides.items():
            peaks = [
                f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else "failed"
                for row in rows
            ]
            peaks += ["not tried"] * (len(lengths) - len(peaks))
            grown = above_least(rows)
            lines_of.append(
                f"| {side}, {way} | {' | '.join(peaks)} | {per_token(rows) / 1e3:,.0f} K | {slope(grown):.2f} |"
            )
        ratio = per_token(sides[OURS]) / per_token(sides[PEER])
        lines_of.append(f"| **ratio, {way}** | {'| ' * len(lengths)}| **{ratio:.2f}** | |")
    lines_of += [
        "",
        "Peak resident memory of the whole process; a token's bytes are the slope of a straight line through the "
        "peaks, growth the slope on two logarithmic axes of what is above its value at no tokens (1 is linear).",
        "",
    ]
    return "\n".join(lines_of)


def above_least(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """The points, less what the process needs without any token."""
    found = points(rows)
    tokens, peaks = (sum(point[axis] for point in found) / len(found) for axis in (0, 1))
    least = peaks - each(found) * tokens
    return [(x, y - least) for x, y in found]


def main(argv: list[str]) -> int:
    """Measure, and write the table and its picture."""
    made = argparse.ArgumentParser(prog="python -m benchmarks context", description=__doc__)
    steps.add_model(made)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    made.add_argument("--allocator", choices=tuple(core.ALLOCATORS), default="default")
    made.add_argument("--out", type=Path, default=core.ROOT / "benchmarks" / "results")
    options = made.parse_args(argv)
    work = Work(model=steps.model_folder(options.model), rows=1)
    found: dict[str, Any] = {
        "work": {**asdict(work), "model": Path(work.model).name},
        "lengths": list(options.lengths),
        "allocator": options.allocator,
        "machine": machine(),
        "commit": commit(),
        "ways": {
            WAYS[again]: measure(work, again, options.allocator, options.threads, options.lengths)
            for again in WAYS
        },
    }
    series = {
        f"{side}, {way}": points(rows)
        for way, sides in found["ways"].items()
        for side, rows in sides.items()
    }
    text = table(found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "context.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "context.md").write_text(text, encoding="utf-8")
    picture = lines(series, above="GB at most", below="tokens of one document")
    (options.out / "context.svg").write_text(picture, encoding="utf-8")
    print(text)
    return 0
