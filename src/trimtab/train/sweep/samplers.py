"""Who chooses the variants of a sweep: every combination, or chance. No torch here."""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

from trimtab.errors import ConfigError
from trimtab.registry import Registry
from trimtab.train.sweep.config import SweepConfig
from trimtab.train.sweep.space import Axis, Choice, Listed, Whole

TRIES = 200
"""Draws in a row that give nothing new, after which there is nothing new."""


class Sampler(ABC):
    """Chooses variants, round by round. The same questions and answers in the same order give the same variants.

    Raises:
        ConfigError: when it is made, for what it cannot choose from.
    """

    def __init__(self, axes: Mapping[str, Axis], config: SweepConfig) -> None:
        self.axes, self.config = axes, config

    @abstractmethod
    def ask(self) -> list[Choice]:
        """The variants of the next round; none after the last one."""

    def tell(self, choice: Choice, step: int, loss: float | None, *, whole: bool) -> None:  # noqa: B027
        """The held-out loss of a variant at a step, which was its last of all if ``whole``; None where it failed."""


@final
class Grid(Sampler):
    """Every combination; the last option varies fastest."""

    def __init__(self, axes: Mapping[str, Axis], config: SweepConfig) -> None:
        super().__init__(axes, config)
        endless = [key for key, axis in axes.items() if not isinstance(axis, Listed)]
        if endless:
            raise ConfigError(
                f"{endless[0]} is a range, which has no end of values: add --random N, or give a list."
            )
        values = [axis.values for axis in axes.values() if isinstance(axis, Listed)]
        self._left = itertools.product(*values)
        self._size = math.prod(map(len, values))

    def ask(self) -> list[Choice]:
        chosen = itertools.islice(self._left, self.config.together or self._size)
        return [dict(zip(self.axes, values, strict=True)) for values in chosen]


@final
class Random(Sampler):
    """Each option for itself, by chance; no combination twice."""

    def __init__(self, axes: Mapping[str, Axis], config: SweepConfig) -> None:
        super().__init__(axes, config)
        self._draw = random.Random(f"sweep:{config.seed}")
        self._known: list[Choice] = []
        most = combinations(axes)
        if most is not None and most < (config.count or 0):
            raise ConfigError(
                f"there are {most} combinations, and --random asks for {config.count}; ask for fewer, or leave it "
                "out for all of them."
            )

    def ask(self) -> list[Choice]:
        left = (self.config.count or 0) - len(self._known)
        size = min(self.config.together or left, left)
        found: list[Choice] = []
        tries = 0
        while len(found) < size and tries < TRIES * size:
            drawn = {key: axis.draw(self._draw) for key, axis in self.axes.items()}
            tries += 1
            if drawn not in self._known:
                self._known.append(drawn)
                found.append(drawn)
        return found


def combinations(axes: Mapping[str, Axis]) -> int | None:
    """How many there are; None where there is no end."""
    sizes = []
    for axis in axes.values():
        if isinstance(axis, Listed):
            sizes.append(len(axis.values))
        elif isinstance(axis, Whole):
            sizes.append(axis.high - axis.low + 1)
        else:
            return None
    return math.prod(sizes)


samplers: Registry[type[Sampler]] = Registry(
    "sampler",
    "trimtab.samplers",
    {
        "grid": "trimtab.train.sweep.samplers:Grid",
        "random": "trimtab.train.sweep.samplers:Random",
        "optuna": "trimtab.train.sweep.optuna:Optuna",
    },
)
