"""Mixed precision under a budget of bits: the layers of the largest quantisation error are kept in int8.

    error = ‖Ŵ − W‖ / ‖W‖ of a layer in the format of four bits

Weights come one by one, in any order, and what each error is beside the others is known at the end alone. So a layer
is kept in both formats for as long as it is among the worst that the budget allows, and drops to four bits when worse
ones come: memory is the base in its final form, the four-bit twins of the layers that are kept, and one dense weight.
Nothing is kept that is better than what had no room, so what is kept at the end does not depend on the order.
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


@dataclass(frozen=True, eq=False)
class _Twin:
    """A layer in four bits whose better twin is in the model."""

    error: float
    path: str
    low: LowBitLinear
    extra: float


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
        self._allowed = average_bits * sum(sizes.values())
        self._spent = BITS[format] * sum(sizes.values())
        self._twins: list[_Twin] = []
        self._left, self._seen = -1.0, 0

    def took(self, name: str, bits: float) -> None:
        """A weight was stored in a format that is not the budget's to choose, and takes so many bits."""
        self._spent += bits - BITS[self._format] * self._sizes[name]
        self._evict()

    def add(self, name: str, path: str, weight_OI: Tensor, bias: Tensor | None) -> None:
        """Round a linear layer's weight and put it into the model, in one format or the other."""
        low = FORMATS[self._format](weight_OI, bias)
        error = 0.0 if weight_OI.is_meta else _error(low, weight_OI)
        size = weight_OI.numel()
        self._seen += 1
        if error <= self._left:  # a worse one had no room
            self._spent += (low.bits - BITS[self._format]) * size
            self._put(path, low)
            self._evict()
            return
        high = FORMATS[HIGHER](weight_OI, bias)
        self._spent += (high.bits - BITS[self._format]) * size
        self._twins.append(_Twin(error, path, low, (high.bits - low.bits) * size))
        self._twins.sort(key=lambda twin: (-twin.error, twin.path))
        self._put(path, high)
        self._evict()

    def _evict(self) -> None:
        while self._twins and self._spent > self._allowed:
            twin = self._twins.pop()
            self._spent -= twin.extra
            self._left = max(self._left, twin.error)
            self._put(twin.path, twin.low)

    def done(self) -> Mixed:
        """What was chosen. The twins of what is kept are dropped."""
        kept = {twin.path: twin.error for twin in self._twins}
        self._twins = []
        average = self._spent / max(sum(self._sizes.values()), 1)
        if self._spent > self._allowed:
            raise ConfigError(
                f"average_bits: this base in {self._format} alone takes {average:.3f} bits a weight; name more."
            )
        return Mixed(average, HIGHER, kept, max(self._left, 0.0), self._seen)


def _error(low: LowBitLinear, weight_OI: Tensor) -> float:
    """How far a rounded weight lies from what it was, relative to it."""
    whole = torch.linalg.vector_norm(weight_OI, dtype=torch.float32)
    off = torch.linalg.vector_norm(low.dense(torch.float32) - weight_OI)
    return float(off / whole) if bool(whole > 0) else 0.0
