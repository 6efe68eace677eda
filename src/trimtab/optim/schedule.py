"""Learning-rate schedules as pure functions of the step; so a resumed run needs no state of theirs.

With s the step (from 0), n the number of steps and w those of warm-up:

    warm-up    (s + 1) / w                         for s < w
    constant   1
    linear     1 − p                               p = (s − w) / (n − w)
    cosine     ½ (1 + cos π p)
"""

from __future__ import annotations

import math
from typing import Literal

from trimtab.errors import ConfigError

ScheduleName = Literal["constant", "linear", "cosine"]


def learning_rate(name: ScheduleName, peak: float, step: int, total: int, warmup: int = 0) -> float:
    """The learning rate of ``step`` (0 ≤ step < total), at most ``peak`` and never 0."""
    if not 0 <= step < total:
        raise ConfigError(f"step {step} lies outside a schedule of {total} steps.")
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    match name:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps(warmup: float, total: int) -> int:
    """``warmup`` as steps: below 1 it is a fraction of ``total``, else a number of steps."""
    steps = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    return min(steps, total)
