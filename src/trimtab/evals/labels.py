"""Metrics of short answers: exact match, choice among labels, and F1 by class.

For class c, with TP answers that say c rightly, FP that say it wrongly and FN references c that got another
answer (or an unreadable one):

    precision = TP / (TP + FP)    recall = TP / (TP + FN)    F1 = 2 TP / (2 TP + FP + FN)

Macro F1 is the mean of the classes' F1; micro F1 is F1 of the sums over classes. An answer that begins with no
label is unreadable: it is an FN of its reference's class and an FP of none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from trimtab.errors import ConfigError
from trimtab.evals.answers import MOST_CHOICES, chosen, normalised
from trimtab.evals.intervals import Interval, Sums, bootstrap, wilson
from trimtab.evals.metrics import Metric, Scores


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class: its ``label``, precision, recall and F1, and how many references and answers have it."""

    label: str
    precision: Interval
    recall: Interval
    f1: float
    references: int
    answers: int


@dataclass(frozen=True, slots=True)
class ClassTable:
    """``confusion[i][j]``: references of class i whose answer is of class j; the last column is unreadable."""

    rows: tuple[ClassRow, ...]
    confusion: tuple[tuple[int, ...], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(row.label for row in self.rows)


@final
class Exact(Metric):
    """The share of answers that equal their reference after normalisation (see `normalised`)."""

    kind: ClassVar[str] = "exact"

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        pairs = zip(references, answers, strict=True)
        hits = sum(normalised(wanted) == normalised(said) for wanted, said in pairs)
        return Scores({self.kind: wilson(hits, len(answers))})


@final
class Choice(Metric):
    """The share of answers that begin with the right one of few labels."""

    kind: ClassVar[str] = "choice"

    def check(self, references: Sequence[str]) -> None:
        check_labels(self.kind, references)

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        wanted, given, _ = _places(references, answers)
        return Scores({self.kind: wilson(int((wanted == given).sum()), len(answers))})


@final
class LabelF1(Metric):
    """Macro and micro F1 over few labels, with a row for each class."""

    kind: ClassVar[str] = "f1"

    def check(self, references: Sequence[str]) -> None:
        check_labels(self.kind, references)

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        wanted, given, labels = _places(references, answers)
        classes = np.arange(len(labels))
        is_wanted, is_given = wanted[:, None] == classes, given[:, None] == classes
        hits = is_wanted & is_given
        rows = np.concatenate([hits, is_given & ~hits, is_wanted & ~hits], axis=1)
        return Scores(
            {
                "f1_macro": bootstrap(rows.astype(np.float64), macro_f1),
                "f1_micro": bootstrap(rows.astype(np.float64), micro_f1),
            },
            _table(wanted, given, labels),
        )


def macro_f1(sums: Sums) -> Sums:
    """Mean F1 over classes from (R, 3C) sums of TP, FP and FN; a class that a draw lacks is left out."""
    hits, false, missed = np.split(sums, 3, axis=1)
    whole = 2 * hits + false + missed
    each = np.divide(2 * hits, whole, out=np.zeros_like(hits), where=whole > 0)
    present = (whole > 0).sum(1)
    return np.asarray(each.sum(1) / np.maximum(present, 1))


def micro_f1(sums: Sums) -> Sums:
    """F1 of the sums over classes, from (R, 3C) sums of TP, FP and FN."""
    hits, false, missed = (part.sum(1) for part in np.split(sums, 3, axis=1))
    return np.asarray(2 * hits / (2 * hits + false + missed))


def check_labels(kind: str, references: Sequence[str]) -> None:
    """Raise `ConfigError` unless the references are a few different labels."""
    counts = Counter(map(normalised, references))
    if len(counts) > MOST_CHOICES:
        raise ConfigError(
            f"metric {kind!r} is for few labels, and the data have {len(counts)} different answers; use 'exact', "
            "'token_f1' or 'loss'."
        )
    if len(counts) < 2:
        raise ConfigError(
            f"metric {kind!r} tells labels apart, and all {len(references)} references are {min(counts)!r}; give "
            "data with two labels or more, or use 'exact'."
        )


def _places(references: Sequence[str], answers: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """The class numbers of references and answers (-1: unreadable), and the labels in order."""
    wanted = [normalised(text) for text in references]
    counts = Counter(wanted)
    labels = sorted(counts)
    number = {label: place for place, label in enumerate(labels)}
    said = [chosen(text, counts) for text in answers]
    given = [-1 if label is None else number[label] for label in said]
    return np.array([number[label] for label in wanted]), np.array(given), labels


def _table(wanted: Any, given: Any, labels: list[str]) -> ClassTable:
    size = len(labels)
    confusion = np.zeros((size, size + 1), dtype=int)
    np.add.at(confusion, (wanted, given), 1)  # -1, unreadable, is the last column
    rows = []
    for place, label in enumerate(labels):
        hits = int(confusion[place, place])
        answered, referred = int(confusion[:, place].sum()), int(confusion[place].sum())
        f1 = 2 * hits / (answered + referred)
        rows.append(
            ClassRow(label, wilson(hits, answered), wilson(hits, referred), f1, referred, answered)
        )
    return ClassTable(tuple(rows), tuple(tuple(map(int, row)) for row in confusion))
