"""Loss and token accuracy on data that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.evals.intervals import Interval, ratio


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``loss`` in nats per unit of token weight, and the weighted share of tokens guessed right; intervals
    are over examples. ``sums`` and ``weights`` are the nats and the token weight of each example."""

    loss: Interval
    accuracy: Interval
    sums: tuple[float, ...] = field(default=(), repr=False)
    weights: tuple[float, ...] = field(default=(), repr=False)

    def change(self, before: HeldOut) -> Interval | None:
        """By how much this loss is above ``before``, example by example: what both share, how hard each example
        is, drops out. None where the two are not of the same examples."""
        if not self.weights or self.weights != before.weights:
            return None
        gaps = [new - old for new, old in zip(self.sums, before.sums, strict=True)]
        return ratio(gaps, self.weights)


def held_out(engine: Engine, data: Sequence[Datum], adapter: str | None) -> HeldOut:
    """Measure one adapter (None: the bare base). Changes nothing, and draws no random number."""
    result = engine.forward(data, adapter)
    loss, accuracy = ratio(result.sums, result.weights), ratio(result.hits, result.weights)
    return HeldOut(loss, accuracy, tuple(result.sums), tuple(result.weights))
