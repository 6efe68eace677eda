"""Learning-rate schedules as pure functions of the step; so a resumed run needs no state of theirs.

With s the step (from 0), n the number of steps and w those of warm-up:

    warm-up    (s + 1) / w                         for s < w
    constant   1
    linear     f + (1 − f) (1 − p)                 p = (s − w) / (n − w)
    cosine     f + (1 − f) ½ (1 + cos π p)
    wsd        1, and f + (1 − f) (1 − √q)         q = (s − (n − d)) / d  in the last d steps

f is the floor. The decay of wsd (warm-up, stable, decay) has the shape 1 − √q of Hägele et al. 2024 (arXiv
2405.18392).
"""

from __future__ import annotations

import math
from typing import Literal

from trimtab.errors import ConfigError

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


def learning_rate(
    name: ScheduleName,
    peak: float,
    step: int,
    total: int,
    *,
    warmup: int = 0,
    decay: int = 0,
    floor: float = 0.0,
) -> float:
    """The learning rate of ``step`` (0 ≤ step < total), at most ``peak`` and never 0 before the end.

    ``warmup`` and ``decay`` are in steps (``decay`` is for wsd); ``floor`` is a share of the peak.
    """
    if not 0 <= step < total:
        raise ConfigError(f"step {step} lies outside a schedule of {total} steps.")
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    match name:
        case "constant":
            return peak
        case "linear":
            share = 1 - progress
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            decay = min(decay, total - warmup)
            begun = step - (total - decay)
            share = 1.0 if begun < 0 else 1 - math.sqrt(begun / decay)
    return peak * (floor + (1 - floor) * share)


def part_of(share: float, total: int) -> int:
    """``share`` as steps: below 1 it is a fraction of ``total`` (rounded up), else a number of steps."""
    steps = math.ceil(share * total) if share < 1 else int(share)
    return min(steps, total)
