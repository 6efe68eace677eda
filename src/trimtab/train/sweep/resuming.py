"""Where a sweep goes on: at the last moment of which every variant has its state.

Variants step together, so that the state of one at step 120 and of another at step 110 are of different moments; going
on from both would show the model other batches than an uninterrupted sweep does, which round otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Saved:
    """The steps of which a variant has a checkpoint, and the one at which it ``waits`` for the others, or ends."""

    steps: frozenset[int]
    waits: int


def moments(saved: Sequence[Saved]) -> list[int]:
    """The step of each at the last moment that is whole; 0 is the beginning."""
    for moment in sorted({step for one in saved for step in one.steps}, reverse=True):
        found = [min(moment, one.waits) for one in saved]
        if all(step in one.steps for step, one in zip(found, saved, strict=True)):
            return found
    return [0] * len(saved)
