"""Mixed precision under a budget of bits: the layers of the largest quantisation error are kept in int8.

    error = ‖Ŵ − W‖ / ‖W‖ of a layer in the format of four bits

From the worst down each is kept that the budget still has room for: errors are relative, so that to weigh them by the
bits they cost would only favour small layers.

Weights come one by one, in any order, and what each error is beside the others is known at the end alone. So a layer
is held in both formats for as long as it may be kept: whoever is kept leaves room for itself after every worse one, so
all worse ones that are no larger are kept too, and once these and it exceed the room, it drops to four bits for good.
What is kept at the end does not depend on the order; memory meanwhile is the base in its final form, one dense weight,
and of each size of layers at most as many twins as the budget has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.lowbit import LowBitLinear

HIGHER = "int8"
BITS: Mapping[str, float] = {
    "nf4": 4 + 8 / 64 + 32 / (64 * 256),
    "fp4": 4 + 8 / 64 + 32 / (64 * 256),
    "int4": 4 + 48 / 64,
}
"""Fewest bits that a weight takes, scales included; small layers take a little more."""
MOST = 8.0


@dataclass(frozen=True)
class Mixed:
    """What a budget gave: bits a weight over the layers in few bits, and which are kept in ``higher`` with the errors
    that they would have had, the largest first; ``left`` is the largest error of those that are not."""

    average_bits: float
    higher: str
    kept: Mapping[str, float]
    left: float
    layers: int

    def __str__(self) -> str:
        found = (
            f"{len(self.kept)} of {self.layers} layers in {self.higher}, {self.average_bits:.2f} bits a weight; errors "
            f"of the others up to {self.left:.1%}"
        )
        if not self.kept:
            return found
        worst, error = next(iter(self.kept.items()))
        return f"{found}; kept: up to {error:.1%} ({worst})"


def check_budget(format: str | None, average_bits: float | None) -> None:
    """Raise `ConfigError` for a budget that no choice of layers meets."""
    if average_bits is None:
        return
    if format is None or format not in BITS:
        raise ConfigError(
            f"average_bits keeps some layers of a base in four bits ({', '.join(BITS)}) in {HIGHER}; storage is "
            f"{format!r}. Layers of other formats are kept dense by exempt."
        )
    if not BITS[format] <= average_bits <= MOST:
        raise ConfigError(
            f"average_bits={average_bits!r}: {format} alone takes {BITS[format]:.3f} bits a weight, and {HIGHER} "
            f"{MOST:g}; name a number between."
        )


@dataclass(eq=False)
class _Seen:
    """A layer of the budget. ``low`` is its four-bit form while the better one is in the model; ``extra`` are the bits
    which that one costs more, and ``needs`` the room without which it cannot be kept."""

    error: float
    path: str
    low: LowBitLinear | None
    extra: int
    needs: int

    @property
    def rank(self) -> tuple[float, str]:
        """The worst is the first."""
        return -self.error, self.path


class Mixer:
    """Chooses while weights come. ``sizes`` are the weights that are to be in few bits; ``put`` places a layer."""

    def __init__(
        self,
        format: str,
        average_bits: float,
        sizes: Mapping[str, int],
        put: Callable[[str, LowBitLinear], None],
    ) -> None:
        self._format, self._put = format, put
        self._sizes = dict(sizes)
        self._room = (average_bits - BITS[format]) * sum(sizes.values())
        self._allowed = average_bits * sum(sizes.values())
        self._seen: list[_Seen] = []

    def took(self, name: str, bits: float) -> None:
        """A weight was stored in a format that is not the budget's to choose, and takes so many bits."""
        self._room -= (bits - BITS[self._format]) * self._sizes[name]
        self._drop()

    def add(self, name: str, path: str, weight_OI: Tensor, bias: Tensor | None) -> None:
        """Round a linear layer's weight and put it into the model, in one format or the other."""
        low = FORMATS[self._format](weight_OI, bias)
        self.took(name, low.bits)
        error = 0.0 if weight_OI.is_meta else _error(low, weight_OI)
        extra = _stored(FORMATS[HIGHER](weight_OI.to("meta"), None)) - _stored(low)
        new = _Seen(error, path, low, extra, extra)
        for other in self._seen:
            worse, better = (new, other) if new.rank < other.rank else (other, new)
            better.needs += worse.extra if worse.extra <= better.extra else 0
        self._seen.append(new)
        if new.needs <= self._room:
            self._put(path, FORMATS[HIGHER](weight_OI, bias))
        self._drop()

    def twins(self) -> list[LowBitLinear]:
        """The four-bit forms that wait beside their better ones."""
        return [one.low for one in self._seen if one.low is not None]

    def _drop(self) -> None:
        for one in self._seen:
            if one.low is not None and one.needs > self._room:
                self._put(one.path, one.low)
                one.low = None

    def done(self) -> Mixed:
        """Choose, and drop the twins."""
        kept: dict[str, float] = {}
        left, room = 0.0, self._room
        for one in sorted(self._seen, key=lambda one: one.rank):
            if one.extra <= room:
                room -= one.extra
                kept[one.path] = one.error
                continue
            left = max(left, one.error)
            if one.low is not None:
                self._put(one.path, one.low)
        count, layers = max(sum(self._sizes.values()), 1), len(self._seen)
        self._seen = []
        average = (self._allowed - room) / count
        if room < 0:
            raise ConfigError(
                f"average_bits: this base in {self._format} alone takes {average:.3f} bits a weight; name more."
            )
        return Mixed(average, HIGHER, kept, left, layers)


def _stored(layer: LowBitLinear) -> int:
    """Bits, scales included."""
    return round(layer.bits * layer.weights)


def _error(low: LowBitLinear, weight_OI: Tensor) -> float:
    """How far a rounded weight lies from what it was, relative to it."""
    whole = torch.linalg.vector_norm(weight_OI, dtype=torch.float32)
    off = torch.linalg.vector_norm(low.dense(torch.float32) - weight_OI)
    return float(off / whole) if bool(whole > 0) else 0.0
