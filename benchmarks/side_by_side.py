"""The README's table of speed and memory, from the committed results.

python -m benchmarks side_by_side                 print it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import context
from benchmarks.core import ROOT

Ratios = tuple[float | None, float]
"""Of speed, where it is measured, and of memory."""


def _step(found: Any) -> Ratios:
    (row,) = found["rows"]
    return row["speed_ratio"]["median"], row["memory_ratio"]["median"]


def _few_bits(found: Any) -> Ratios:
    (row,) = found["rows"]
    return row["speed_over_peft"]["median"], row["memory_over_peft"]["median"]


def _trainer(found: Any) -> Ratios:
    part = found["parts"]["trainer"]
    return part["speed_ratio"]["median"], part["memory_ratio"]["median"]


def _against(peer: str) -> Callable[[Any], Ratios]:
    def ratios(found: Any) -> Ratios:
        against = found["rows"][0]["against"][peer]
        return against["speed"]["median"], against["memory"]

    return ratios


def _class(task: str, dtype: str) -> Callable[[Any], Ratios]:
    def ratios(found: Any) -> Ratios:
        (row,) = (r for r in found["rows"] if (r["task"], r["dtype"]) == (task, dtype))
        return row["speed_ratio"]["median"], row["memory_ratio"]

    return ratios


def _other(part: str, side: str = "trimtab") -> Callable[[Any], Ratios]:
    def ratios(found: Any) -> Ratios:
        (row,) = (row for row in found["rows"] if row["part"] == part)
        own = row["sides"][side]
        return own["speed"]["median"], own["memory"]["median"]

    return ratios


def _answers(part: str, peer: str) -> Callable[[Any], Ratios]:
    def ratios(found: Any) -> Ratios:
        (row,) = (row for row in found["rows"] if row["part"] == part)
        ours, other = row["sides"]["trimtab"], row["sides"][peer]
        return other["speed"]["median"], ours["peak_gb"] / other["peak_gb"]

    return ratios


def _context(way: str) -> Callable[[Any], Ratios]:
    def ratios(found: Any) -> Ratios:
        sides = found["ways"][way]
        mine, other = (context.per_token(sides[name]) for name in (context.OURS, context.PEER))
        return None, mine / other

    return ratios


STEP = "a step of 4 × 512 tokens"
ROWS: tuple[tuple[str, str, str, Callable[[Any], Ratios]], ...] = (
    (STEP, "`peft`", "lora_step_xeon", _step),
    (f"{STEP}, MLPs computed again", "`peft`, checkpointing", "other_steps", _other("recompute", "trimtab, mlp")),
    (f"{STEP}, blocks computed again", "`peft`, checkpointing", "other_steps", _other("recompute", "trimtab, blocks")),
    (f"{STEP}, the base in NF4", "`peft` with bitsandbytes", "qlora_step", _few_bits),
    (f"{STEP}, DoRA", "`peft`", "other_steps", _other("dora")),
    (f"{STEP}, (IA)³", "`peft`", "other_steps", _other("ia3")),
    (f"{STEP}, prefix tuning", "`peft`", "other_steps", _other("prefix")),
    (f"{STEP}, bottleneck adapters", "our own LoRA", "other_steps", _other("bottleneck")),
    ("a `Trainer` script, its import changed", "`peft`", "face_trainer_xeon", _trainer),
    ("chats of mixed lengths, answers learnt", "TRL's `SFTTrainer`", "sft", _against("trl")),
    ("the same", "TRL, its checkpointing off", "sft", _against("trl, kept")),
    ("MiniLM classifies news articles, fp32", "`Trainer` with `peft`", "classify", _class("articles", "float32")),
    ("the same in bf16", "`Trainer` with `peft`", "classify", _class("articles", "bfloat16")),
    ("MiniLM classifies sentences, fp32", "`Trainer` with `peft`", "classify", _class("reviews", "float32")),
    ("the same in bf16", "`Trainer` with `peft`", "classify", _class("reviews", "bfloat16")),
    ("memory of one more token, up to 8,192", "`peft`", "context", _context(context.WAYS[False])),
    ("the same, blocks computed again", "`peft`, checkpointing", "context", _context(context.WAYS[True])),
    ("log-probabilities of mixed texts", "`transformers`", "scoring", _against("transformers")),
    ("the same", "`transformers`, sorted", "scoring", _against("transformers, sorted")),
    ("64 requests of mixed lengths answered", "`generate`, padded", "serving", _answers("bare", "generate, padded")),
    ("the same", "its continuous batching", "serving", _answers("bare", "continuous batching")),
    ("32 requests to 32 LoRAs answered", "`peft`, mixed batch", "serving", _answers("adapters", "peft, adapter_names")),
    ("the same", "`peft`, one after another", "serving", _answers("adapters", "peft, set_adapter")),
)  # fmt: skip


def table() -> list[str]:
    """Its lines."""
    lines = ["| work | beside | times as fast | of its peak memory |", "|---|---|---|---|"]
    for work, peer, name, ratios in ROWS:
        path = f"benchmarks/results/{name}"
        found = json.loads((ROOT / f"{path}.json").read_text(encoding="utf-8"))
        told = " | ".join("" if value is None else f"{value:.2f}" for value in ratios(found))
        lines.append(f"| [{work}]({path}.md) | {peer} | {told} |")
    return lines


def main(argv: Sequence[str]) -> int:
    """Print it."""
    print("\n".join(table()))
    return 0
