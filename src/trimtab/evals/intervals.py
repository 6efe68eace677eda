"""95 % confidence intervals.

`wilson`: a share k/n (Wilson 1927); it stays inside [0, 1] and holds for small n. With z = 1.96,

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).

`ratio`: Σ a_i / Σ b_i over examples (a loss per token), by the delta method: examples are the independent
units, not tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """A ``value`` with the ends of its 95 % interval, from ``count`` independent examples."""

    value: float
    low: float
    high: float
    count: int

    def apart(self, other: Interval) -> bool:
        """Whether the two intervals do not touch."""
        return self.high < other.low or other.high < self.low

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def wilson(hits: int, count: int) -> Interval:
    """The share of ``hits`` among ``count`` (of none, nothing is known: 0 to 1)."""
    if count == 0:
        return Interval(0.0, 0.0, 1.0, 0)
    share = hits / count
    centre = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    # At the ends the formula is exact but for rounding.
    low = 0.0 if hits == 0 else (centre - spread) / scale
    high = 1.0 if hits == count else (centre + spread) / scale
    return Interval(share, low, high, count)


def ratio(parts: Sequence[float], weights: Sequence[float]) -> Interval:
    """Σ parts / Σ weights over independent examples."""
    count, weight = len(parts), sum(weights)
    if weight == 0:
        return Interval(0.0, 0.0, 0.0, count)
    value = sum(parts) / weight
    if count < 2:
        return Interval(value, value, value, count)
    rests = [a - value * b for a, b in zip(parts, weights, strict=True)]
    spread = Z * math.sqrt(count / (count - 1) * sum(rest * rest for rest in rests)) / weight
    return Interval(value, value - spread, value + spread, count)
