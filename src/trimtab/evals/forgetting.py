"""Forgetting: how well the model still predicts a plain text that has nothing to do with the training data.

    perplexity = exp(Σ nll / Σ tokens)

over paragraphs of at most 256 tokens, every token counted. Paragraphs are the independent units; the interval is
that of the log (`ratio`), so that of the perplexity is not symmetric. What two measurements share, the difficulty
of each paragraph, drops out of their difference: `Forgetting.change` is far sharper than either alone.

The text that Trimtab brings is `texts/general.txt`: 16 paragraphs on everyday subjects, about 1,900 words or, with
a tokenizer of today's models, 2,300 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import DataError
from trimtab.evals.intervals import Interval, ratio

LONGEST = 256
MOST_TOKENS = 3000


@dataclass(frozen=True, slots=True)
class Forgetting:
    """One measurement: nats (``sums``) and tokens (``weights``) of each paragraph."""

    sums: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def loss(self) -> Interval:
        """Nats per token."""
        return ratio(self.sums, self.weights)

    @property
    def perplexity(self) -> Interval:
        return exponential(self.loss)

    def change(self, before: Forgetting) -> Interval:
        """Nats per token that this is worse than ``before`` on the same paragraphs."""
        if self.weights != before.weights:
            raise DataError("two measurements of forgetting are of different texts.")
        gaps = [new - old for new, old in zip(self.sums, before.sums, strict=True)]
        return ratio(gaps, self.weights)

    def fields(self) -> dict[str, Any]:
        """As an event holds it."""
        return {"loss": asdict(self.loss), "sums": list(self.sums), "weights": list(self.weights)}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """What `fields` gave."""
        return cls(tuple(fields["sums"]), tuple(fields["weights"]))


def forgetting(engine: Engine, data: Sequence[Datum], adapter: str | None) -> Forgetting:
    """Measure one adapter (None: the bare base) on `paragraphs`. Changes nothing, draws no random number."""
    result = engine.forward(data, adapter)
    return Forgetting(tuple(result.sums), tuple(result.weights))


def exponential(interval: Interval) -> Interval:
    """A loss in nats, with its interval, as a perplexity."""
    value, low, high = (_exp(x) for x in (interval.value, interval.low, interval.high))
    return Interval(value, low, high, interval.count)


def paragraphs(
    text: str, tokenizer: PreTrainedTokenizerBase, *, longest: int = LONGEST
) -> list[Datum]:
    """The paragraphs of a text, longer ones in pieces, as far as `MOST_TOKENS` tokens go.

    Each piece begins with what the tokenizer puts before a text.

    Raises:
        DataError: the text holds nothing to predict.
    """
    found: list[Datum] = []
    left = MOST_TOKENS
    for number, paragraph in enumerate(text.split("\n\n"), start=1):
        begin, ids = _tokens(paragraph.strip(), tokenizer)
        size = max(min(longest, LONGEST) - len(begin), 2)
        for start in range(0, len(ids), size):
            piece = [*begin, *ids[start : start + size]]
            if len(piece) < 2 or len(piece) > left:
                continue
            left -= len(piece)
            found.append(Datum.causal(piece, [1.0] * len(piece), origin=f"paragraph {number}"))
    if not found:
        raise DataError("the text to measure forgetting on is empty.")
    return found


def general_text() -> str:
    """The text that Trimtab brings."""
    return (files("trimtab.evals") / "texts" / "general.txt").read_text(encoding="utf-8")


def read_text(path: str | Path) -> str:
    """A text file of the user's. Raises `DataError`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the text to measure forgetting on, {str(path)!r}: {error}. "
            "Give a UTF-8 text file as eval.forgetting, or true for the text that Trimtab brings."
        ) from error


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and the text's own tokens."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], plain
    return [], plain


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
