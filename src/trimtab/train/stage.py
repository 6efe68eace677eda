"""Where courses take place, and what they are told of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.engine import Engine, LossResult
from trimtab.models.load import Base
from trimtab.train.screen import Screen


@dataclass(frozen=True, slots=True)
class Computed:
    """What the examples of a step gave: their losses (the gradients lie in the adapter), and the seconds they took."""

    loss: LossResult
    seconds: float


@dataclass(frozen=True)
class Stage:
    """Where courses take place: on this base, by this engine, shown on this screen. ``warn`` says one line of what a
    user should know in any case."""

    base: Base
    engine: Engine
    screen: Screen
    warn: Callable[[str], None]
