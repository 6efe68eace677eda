"""One training example as the engine sees it: token ids, their targets, and a weight per target.

A datum knows nothing of text, templates or adapters' names beyond the owner it trains. ``targets[i]``
is the token that should follow ``tokens[: i + 1]``; ``weights[i]`` is 0 where nothing is to be learnt.
A text to be classified is a datum too: after its last token follows, with weight 1, the number of its class.
What some losses need (`trimtab.losses`) is given in the same way: ``logprobs[i]`` is what log p of ``targets[i]`` was
elsewhere (where it was drawn, or of a reference), ``advantages[i]`` how much better than expected it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from trimtab.errors import DataError


@dataclass(frozen=True, slots=True)
class Datum:
    """``tokens``, ``targets`` and ``weights`` have one length; so have ``logprobs`` and ``advantages`` where they are
    given. ``origin`` says where it came from."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    weights: tuple[float, ...]
    origin: str = ""
    logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.targets) == len(self.weights):
            raise DataError(
                f"{self.origin or 'datum'}: {len(self.tokens)} tokens, {len(self.targets)} targets and "
                f"{len(self.weights)} weights; the three must have one length."
            )
        for name, values in (("logprobs", self.logprobs), ("advantages", self.advantages)):
            if values and len(values) != len(self.tokens):
                raise DataError(
                    f"{self.origin or 'datum'}: {len(self.tokens)} tokens and {len(values)} {name}; give one for each "
                    "target (any number where the weight is 0)."
                )
        if not self.tokens:
            raise DataError(f"{self.origin or 'datum'}: no tokens; an example needs at least two.")

    @classmethod
    def causal(
        cls,
        ids: Sequence[int],
        weights: Sequence[float],
        *,
        origin: str = "",
        logprobs: Sequence[float] = (),
        advantages: Sequence[float] = (),
    ) -> Self:
        """From a whole text: ``weights[i]`` says how much token ``ids[i]`` is to be learnt, ``logprobs[i]`` and
        ``advantages[i]`` are of it too."""
        each = (tuple(map(float, values[1:])) for values in (weights, logprobs, advantages))
        learnt, *given = each
        return cls(tuple(ids[:-1]), tuple(ids[1:]), learnt, origin, *given)

    @classmethod
    def classified(cls, ids: Sequence[int], number: int, *, origin: str = "") -> Self:
        """A whole text and the ``number`` of its class, which counts as one token."""
        return cls.causal((*ids, number), (*(0.0 for _ in ids), 1.0), origin=origin)

    def with_logprobs(self, logprobs: Sequence[float]) -> Self:
        """The same with log-probabilities: one for each target that has a weight."""
        given = iter(logprobs)
        return replace(self, logprobs=tuple(next(given) if w else 0.0 for w in self.weights))

    @property
    def prompt(self) -> int:
        """Number of leading tokens before the first trained target: what a gate may look at."""
        return next((i + 1 for i, w in enumerate(self.weights) if w), len(self.tokens))

    def __len__(self) -> int:
        return len(self.tokens)
