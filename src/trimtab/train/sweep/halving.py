"""Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): who loses early is not trained to the end.

Of N variants, N/η go on after a share 1/η^s of their steps, N/η² after η times as many, and so on, with
s = ⌊log_η N⌋: each stretch between two decisions costs about as much as any other. Shares and not steps, so that
variants with batches of other sizes are judged when they have seen as much of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Rung:
    """After this ``share`` of their steps, ``keep`` variants go on."""

    share: Fraction
    keep: int

    def step(self, total: int) -> int:
        """The step of a variant of ``total`` steps."""
        return -(-total * self.share.numerator // self.share.denominator)


def rungs(count: int, eta: int, first: int, totals: Sequence[int]) -> tuple[Rung, ...]:
    """The decisions on ``count`` variants with that many steps, none before step ``first`` of any.

    Decisions that would come at the same step are one.
    """
    if eta < 2:
        return ()
    levels = 0
    while eta ** (levels + 1) <= count:
        levels += 1
    found: dict[tuple[int, ...], Rung] = {}
    for level in range(levels):
        rung = Rung(Fraction(1, eta ** (levels - level)), max(count // eta ** (level + 1), 1))
        steps = tuple(rung.step(total) for total in totals)
        if min(steps) >= first:
            found[steps] = rung
    return tuple(found.values())


def budget(count: int, decisions: Sequence[Rung], total: int) -> int:
    """Steps of all variants together, were each of ``total`` steps."""
    steps, here, left = 0, 0, count
    for rung in decisions:
        steps += left * (rung.step(total) - here)
        here, left = rung.step(total), rung.keep
    return steps + left * (total - here)
