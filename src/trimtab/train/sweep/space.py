"""What a sweep varies: lists and ranges, by the dotted names of a recipe's options. No torch here.

optim.lr=[1e-4, 3e-4]      these values
optim.lr=log(1e-5, 1e-3)   any between these, evenly on a logarithmic scale
optim.warmup=uniform(0, 0.2), method.rank=int(2, 32)
optim.schedule=cosine      one value for all variants
"""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from trimtab.errors import ConfigError
from trimtab.train.recipe_file import override

Choice = dict[str, Any]
"""One variant: its value of each option that varies, by dotted name."""

_RANGE = re.compile(r"(log|uniform|int)\s*\((.*)\)", re.DOTALL)
_DIGITS = 3
"""Of a number that is drawn, so that it can be read and typed again."""


class Axis(ABC):
    """The values that one option takes."""

    @abstractmethod
    def draw(self, draw: random.Random) -> Any:
        """One of them, by chance."""


@final
@dataclass(frozen=True)
class Listed(Axis):
    """These values, each as likely as any."""

    values: tuple[Any, ...]

    def draw(self, draw: random.Random) -> Any:
        return draw.choice(self.values)


@final
@dataclass(frozen=True)
class Between(Axis):
    """Numbers between two, evenly; on a logarithmic scale where ``log``."""

    low: float
    high: float
    log: bool = False

    def draw(self, draw: random.Random) -> float:
        if self.log:
            drawn = math.exp(draw.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = draw.uniform(self.low, self.high)
        return self.rounded(drawn)

    def rounded(self, value: float) -> float:
        """The value in few digits, still between the two."""
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


@final
@dataclass(frozen=True)
class Whole(Axis):
    """Whole numbers between two, both among them."""

    low: int
    high: int

    def draw(self, draw: random.Random) -> int:
        return draw.randint(self.low, self.high)


def _log(low: float, high: float) -> Axis:
    if low <= 0:
        raise ValueError("a logarithm begins above 0")
    return Between(low, high, log=True)


def _int(low: float, high: float) -> Axis:
    if low != int(low) or high != int(high):
        raise ValueError("int takes whole numbers")
    return Whole(int(low), int(high))


_RANGES: Mapping[str, Callable[[float, float], Axis]] = {
    "log": _log, "uniform": Between, "int": _int
}  # fmt: skip


@dataclass(frozen=True)
class Space:
    """Options in the order in which they were given; each value is the same for all variants, or an `Axis`."""

    options: Mapping[str, Any]

    @property
    def axes(self) -> dict[str, Axis]:
        """What varies."""
        return {key: value for key, value in self.options.items() if isinstance(value, Axis)}

    def values(self, choice: Choice) -> dict[str, Any]:
        """All options of one variant."""
        return {key: choice.get(key, value) for key, value in self.options.items()}


def given_options(overrides: Sequence[str]) -> dict[str, Any]:
    """The options as they were typed, ``a.b=value``.

    Raises:
        ConfigError: one that cannot be read, or is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in map(override, overrides):
        if key in found:
            raise ConfigError(f"{key} is given twice; give all its values in one list.")
        found[key] = value
    return found


def space_of(options: Mapping[str, Any]) -> Space:
    """What lists and ranges among the options say.

    Raises:
        ConfigError: a list that is empty, has one value or the same one twice; a range that is none; nothing varies.
    """
    space = Space({key: _read(key, value) for key, value in options.items()})
    if not space.axes:
        raise ConfigError(
            "nothing varies: give an option several values, such as 'optim.lr=[1e-4,3e-4,1e-3]', or a range and "
            "--random, such as 'optim.lr=log(1e-5,1e-3)' --random 8; trimtab train takes one value of each."
        )
    return space


def _read(key: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return _listed(key, list(value))
    form = _RANGE.fullmatch(value.strip()) if isinstance(value, str) else None
    return value if form is None else _range(key, form.group(1), form.group(2))


def _listed(key: str, values: list[Any]) -> Any:
    if not values:
        raise ConfigError(f"{key} has an empty list of values; give two or more.")
    twice = next((value for n, value in enumerate(values) if value in values[:n]), None)
    if twice is not None:
        raise ConfigError(f"{key} lists {twice!r} twice; give each value once.")
    if len(values) > 1:
        return Listed(tuple(values))
    if isinstance(values[0], list):
        return values[0]
    raise ConfigError(
        f"{key} lists one value; give two or more, or {key}={values[0]} for all variants (a list as that value has "
        f"brackets of its own: {key}=[[…]])."
    )


def _range(key: str, kind: str, inside: str) -> Axis:
    try:
        low, high = (float(text) for text in inside.split(","))
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("the first number is to be below the second")
        return _RANGES[kind](low, high)
    except ValueError as error:
        raise ConfigError(
            f"{key}: {kind}({inside}) is no range: {error}. Write {kind}(low,high)."
        ) from None
