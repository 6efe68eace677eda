"""From events to metrics: the numbers that a tracker draws, under names that are the same in every tool.

train/loss  train/accuracy  train/lr  train/grad_norm  train/tokens  train/tokens_per_second  train/epoch
eval/loss  eval/accuracy  eval/answers  eval/…              held out; the base at step 0
forgetting/loss  forgetting/perplexity                      on an unrelated text
run/peak_bytes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.train.events import Event


@dataclass(frozen=True, slots=True)
class Point:
    """Metrics at one step."""

    step: int
    time: float
    values: Mapping[str, float]


class Metrics:
    """Turns events into points, in the order in which they were noted."""

    def __init__(self) -> None:
        self._tokens = 0

    def of(self, event: Event) -> Point | None:
        """The finite numbers of one event; None where it has none to draw."""
        match event.get("event"):
            case "step":
                found = self._step(event)
            case "eval":
                found = _eval(event)
            case "forgetting":
                loss = event["loss"]["value"]
                found = {"forgetting/loss": loss, "forgetting/perplexity": _exp(loss)}
            case "end":
                found = {"run/peak_bytes": event.get("peak_bytes")}
            case _:
                return None
        values = {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        return Point(event["step"], event["time"], values) if values else None

    def _step(self, event: Event) -> dict[str, Any]:
        tokens, self._tokens = event["tokens"] - self._tokens, event["tokens"]
        found = {
            f"train/{name}": event.get(name)
            for name in ("loss", "accuracy", "lr", "grad_norm", "tokens", "epoch")
        }
        if event["seconds"]:
            found["train/tokens_per_second"] = tokens / event["seconds"]
        auxiliary = event.get("auxiliary", {})
        return found | {f"train/{name}": value for name, value in auxiliary.items()}


def _eval(event: Event) -> dict[str, Any]:
    found = {"eval/loss": event["loss"]["value"], "eval/accuracy": event["accuracy"]["value"]}
    if event.get("answers"):
        found["eval/answers"] = event["answers"]["interval"]["value"]
    metrics = event.get("metrics") or {}
    return found | {f"eval/{name}": interval["value"] for name, interval in metrics.items()}


def _exp(value: Any) -> float:
    return math.exp(value) if isinstance(value, int | float) and value < 700 else math.inf
