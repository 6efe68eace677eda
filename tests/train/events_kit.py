"""Runs as their folders hold them, written by hand: what a report or a comparison is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.train.events import Events


def interval(value: float, reach: float = 0.05, count: int = 40) -> dict[str, Any]:
    return {"value": value, "low": value - reach, "high": value + reach, "count": count}


def sample(answer: str, *, correct: bool | None = None) -> dict[str, Any]:
    return {
        "prompt": "Is <it>?", "reference": "yes", "answer": answer, "correct": correct, "origin": "f:1"
    }  # fmt: skip


def evaluation(step: int, loss: float, **more: Any) -> dict[str, Any]:
    fields = {
        "step": step, "of": "adapter" if step else "base", "loss": interval(loss), "accuracy": interval(0.5),
        "answers": None, "samples": [],
    }  # fmt: skip
    return fields | more


def unrelated(step: int, sums: Sequence[float]) -> dict[str, Any]:
    weights = [10.0] * len(sums)
    of = "adapter" if step else "base"
    return {"step": step, "of": of, "text": "general.txt", "sums": list(sums), "weights": weights,
            "loss": interval(sum(sums) / sum(weights))}  # fmt: skip


def start(total: int, **more: Any) -> dict[str, Any]:
    fields = {
        "plan": [["method", "lora(rank=2)"], ["data", "d.jsonl: 100 rows read: 100 used."]],
        "previews": ["⟦yes⟧ & <b>"], "total": total, "parameters": 1000, "bytes": 4000,
        "model_parameters": 100_000, "data": {"name": "d.jsonl", "sha256": "ab" * 32, "examples": 100},
        "held_out": 40, "held_out_sha256": "cd" * 32, "versions": {"torch": "2"}, "machine": {"cores": 2},
    }  # fmt: skip
    return fields | more


def write_run(
    folder: Path,
    losses: Sequence[float],
    *others: tuple[str, dict[str, Any]],
    recipe: dict[str, Any] | None = None,
    begin: dict[str, Any] | None = None,
    finished: bool = True,
) -> Path:
    """A run of one step a loss, with other events where their steps belong."""
    folder.mkdir(parents=True)
    options = {"model": "m", "method": {"kind": "lora", "rank": 2}, "optim": {"lr": 1e-3}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(options | (recipe or {})))
    events = Events(folder / "events.jsonl")
    events.add("start", start(len(losses), **(begin or {})))
    for step in range(len(losses) + 1):
        if step:
            events.add("step", {
                "step": step, "loss": losses[step - 1], "accuracy": 0.5, "lr": 1e-3, "grad_norm": 2.0,
                "tokens": 100 * step, "weight": 10.0, "seconds": 0.5, "epoch": 0,
            })  # fmt: skip
        for kind, fields in others:
            if fields["step"] == step:
                events.add(kind, fields)
    if finished:
        events.add("end", {"step": len(losses), "tokens": 0, "peak_bytes": 2**30})
    events.close()
    return folder
