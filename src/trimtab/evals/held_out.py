"""Loss and token accuracy on data that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.evals.intervals import Interval, ratio


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``loss`` in nats per unit of token weight, and the weighted share of tokens guessed right; intervals
    are over examples."""

    loss: Interval
    accuracy: Interval


def held_out(engine: Engine, data: Sequence[Datum], adapter: str | None) -> HeldOut:
    """Measure one adapter (None: the bare base). Changes nothing, and draws no random number."""
    result = engine.forward(data, adapter)
    return HeldOut(ratio(result.sums, result.weights), ratio(result.hits, result.weights))
