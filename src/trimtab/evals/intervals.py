"""95 % confidence intervals.

`wilson`: a share k/n (Wilson 1927); it stays inside [0, 1] and holds for small n. With z = 1.96,

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).

`ratio`: Σ a_i / Σ b_i over examples (a loss per token), by the delta method: examples are the independent
units, not tokens.

`bootstrap`: anything that is computed from sums over examples (F1, BLEU, a mean), by drawing the examples
anew with replacement: the 2.5th and 97.5th percentiles over the draws (Efron and Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError

Z = 1.959963984540054
RESAMPLES = 1000
AT_ONCE = 2_000_000
"""Cells of counts in memory at a time: examples times resamples."""

Sums = NDArray[np.float64]


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


def bootstrap(
    rows: Sequence[Sequence[float]] | Sums,
    value: Callable[[Sums], Sums],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The value of all examples, with its percentile interval.

    Args:
        rows: (N, K), what each of N examples adds to the K sums.
        value: from sums (R, K) to values (R,); not-a-number where a draw has none.
        resamples: how many times the examples are drawn anew; ``seed`` makes them repeat.

    Raises:
        DataError: no examples.
    """
    table = np.asarray(rows, dtype=np.float64)
    count = len(table)
    if count == 0:
        raise DataError("there are no examples to compute a metric of.")
    whole = float(value(table.sum(0)[None])[0])
    if count == 1:
        return Interval(whole, whole, whole, 1)
    draw = np.random.default_rng(seed)
    found: list[Sums] = []
    left = resamples
    while left:
        number = min(left, max(AT_ONCE // count, 1))
        members = draw.integers(count, size=(number, count)) + np.arange(number)[:, None] * count
        times = np.bincount(members.ravel(), minlength=number * count).reshape(number, count)
        found.append(value(times.astype(np.float64) @ table))
        left -= number
    low, high = np.nanpercentile(np.concatenate(found), (2.5, 97.5))
    return Interval(whole, float(low), float(high), count)


def mean(values: Sequence[float]) -> Interval:
    """The plain mean over examples, with its bootstrap interval."""
    return bootstrap([(one, 1.0) for one in values], lambda sums: sums[:, 0] / sums[:, 1])
