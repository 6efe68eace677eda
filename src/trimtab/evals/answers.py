"""Greedy answers compared with references: exact match, and choice among the references' own labels."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from trimtab.data import Datum
from trimtab.engine import Engine, SamplingParams
from trimtab.errors import ConfigError
from trimtab.evals.intervals import Interval, wilson

MOST_CHOICES = 50
T = TypeVar("T")
Metric = Literal["exact", "choice"]


@dataclass(frozen=True, slots=True)
class Question:
    """The tokens to answer, the text that should come, and how many tokens that is (its end included)."""

    prompt: tuple[int, ...]
    reference: str
    length: int
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer beside its reference."""

    question: Question
    text: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of right answers; ``majority`` is that of always giving the commonest reference (``commonest``)."""

    interval: Interval
    majority: float
    commonest: str
    unreadable: int = 0


def some(items: Sequence[T], count: int | None) -> list[T]:
    """``count`` of the items (None: all), drawn the same way each time, in their order: the first ones of a file
    that is sorted by label would be no sample of it."""
    if count is None or count >= len(items):
        return list(items)
    chosen = sorted(random.Random(0).sample(range(len(items)), count))
    return [items[place] for place in chosen]


def questions(
    data: Sequence[Datum], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] = ()
) -> list[Question]:
    """The last trained run of each datum as a reference, and all before it as its prompt; with ``labels`` (those
    of a classifier) the name of its class, and its whole text."""
    if labels:
        return [Question(d.tokens, labels[d.targets[-1]], 1, d.origin) for d in data]
    return [_question(datum, tokenizer) for datum in data]


def answer(
    engine: Engine,
    asked: Sequence[Question],
    adapter: str | None,
    *,
    max_tokens: int | None = None,
) -> list[str]:
    """Greedy answers; by default as long as the longest reference, within the context. Those of a classifier are
    names of classes."""
    if not asked:
        return []
    if engine.labels:
        shares = engine.classify([question.prompt for question in asked], adapter)
        return [engine.labels[row.index(max(row))] for row in shares]
    most = max_tokens or max(question.length for question in asked)
    limit = engine.context(adapter)
    if limit is not None:
        most = max(min(most, limit - max(len(question.prompt) for question in asked)), 1)
    params = SamplingParams(max_tokens=most, temperature=0)
    return [done.text for done in engine.sample([q.prompt for q in asked], params, adapter)]


def score(
    asked: Sequence[Question], answers: Sequence[str], metric: Metric
) -> tuple[Accuracy, list[Answered]]:
    """Compare answers with references.

    ``exact``: equal after normalisation (Unicode form, case, white space, punctuation at the ends).
    ``choice``: the reference is one of few labels; an answer counts as the label that it begins with.

    Raises:
        ConfigError: ``choice`` where the references are not labels but texts of their own.
    """
    references = [normalised(question.reference) for question in asked]
    counts = Counter(references)
    if metric == "choice" and len(counts) > MOST_CHOICES:
        raise ConfigError(
            f"metric 'choice' is for few labels, and the held-out data have {len(counts)} different answers; "
            "use 'exact', or 'loss'."
        )
    given = [chosen(text, counts) if metric == "choice" else normalised(text) for text in answers]
    pairs = zip(asked, answers, given, references, strict=True)
    done = [Answered(q, text, found == wanted) for q, text, found, wanted in pairs]
    commonest, most = counts.most_common(1)[0] if counts else ("", 0)
    return Accuracy(
        wilson(sum(one.correct for one in done), len(done)),
        most / len(done) if done else 0.0,
        commonest,
        sum(found is None for found in given),
    ), done


def normalised(text: str) -> str:
    """Without what people would not call a difference."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"\s+", " ", folded).strip()
    # A reference of punctuation alone stays what it is.
    return words.strip(" .,:;!?\"'`*") or words


def chosen(text: str, labels: Counter[str]) -> str | None:
    """The label that ``text`` begins with, on whole words; the longest if several."""
    said = normalised(text)
    for label in sorted(labels, key=len, reverse=True):
        rest = said[len(label) :]
        if said.startswith(label) and not (rest and rest[0].isalnum() and label[-1:].isalnum()):
            return label
    return None


def _question(datum: Datum, tokenizer: PreTrainedTokenizerBase) -> Question:
    weighted = [weight > 0 for weight in datum.weights]
    stop = len(weighted) - next((n for n, on in enumerate(reversed(weighted)) if on), 0)
    length = len(list(takewhile(bool, reversed(weighted[:stop]))))
    start = stop - length
    text = tokenizer.decode(
        datum.targets[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Question(datum.tokens[: start + 1], str(text), length, datum.origin)
