"""One training example as the engine sees it: token ids, their targets, and a weight per target.

A datum knows nothing of text, templates or adapters' names beyond the owner it trains. ``targets[i]``
is the token that should follow ``tokens[: i + 1]``; ``weights[i]`` is 0 where nothing is to be learnt.
A text to be classified is a datum too: after its last token follows, with weight 1, the number of its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from trimtab.errors import DataError


@dataclass(frozen=True, slots=True)
class Datum:
    """``tokens``, ``targets`` and ``weights`` have one length; ``origin`` says where it came from."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    weights: tuple[float, ...]
    origin: str = ""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.targets) == len(self.weights):
            raise DataError(
                f"{self.origin or 'datum'}: {len(self.tokens)} tokens, {len(self.targets)} targets and "
                f"{len(self.weights)} weights; the three must have one length."
            )
        if not self.tokens:
            raise DataError(f"{self.origin or 'datum'}: no tokens; an example needs at least two.")

    @classmethod
    def causal(cls, ids: Sequence[int], weights: Sequence[float], *, origin: str = "") -> Self:
        """From a whole text: ``weights[i]`` says how much token ``ids[i]`` is to be learnt."""
        return cls(tuple(ids[:-1]), tuple(ids[1:]), tuple(float(w) for w in weights[1:]), origin)

    @classmethod
    def classified(cls, ids: Sequence[int], number: int, *, origin: str = "") -> Self:
        """A whole text and the ``number`` of its class, which counts as one token."""
        return cls.causal((*ids, number), (*(0.0 for _ in ids), 1.0), origin=origin)

    @property
    def prompt(self) -> int:
        """Number of leading tokens before the first trained target: what a gate may look at."""
        return next((i + 1 for i, w in enumerate(self.weights) if w), len(self.tokens))

    def __len__(self) -> int:
        return len(self.tokens)
