"""Metrics: ways to compare answers with references, by name.

    exact     equal but for case, white space and punctuation at the ends        share, Wilson interval
    choice    the right one of few labels, as the answer's first words           share, Wilson interval
    f1        few labels: F1 by class, their mean (macro) and pooled (micro)     bootstrap
    token_f1  words in common with the reference, as SQuAD counts them           bootstrap
    json      JSON objects: parsed, equal, and F1 over their fields              Wilson; F1 bootstrap
    rouge     ROUGE-1, -2 and -L F-measure, by rouge-score                       bootstrap
    bleu      corpus BLEU, 0 to 100, by sacrebleu                                bootstrap
    chrf      corpus chrF2, 0 to 100, by sacrebleu                               bootstrap

Another package adds one through the entry-point group ``trimtab.metrics``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import ConfigError, DataError
from trimtab.evals.intervals import Interval
from trimtab.registry import Registry

if TYPE_CHECKING:
    from trimtab.evals.labels import ClassTable


@dataclass(frozen=True, slots=True)
class Scores:
    """``values`` by name; ``classes`` where the answers are labels; ``fields``: the share of right values by
    field of the references' JSON objects."""

    values: Mapping[str, Interval]
    classes: ClassTable | None = None
    fields: Mapping[str, Interval] = field(default_factory=dict)


class Metric(ABC):
    """One way to compare answers with references. Has no state."""

    kind: ClassVar[str]

    def check(self, references: Sequence[str]) -> None:  # noqa: B027 (most metrics fit any text)
        """Raise `ConfigError` where the metric does not fit the references, or its library is missing."""

    @abstractmethod
    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        """Compare each answer with its reference."""


metrics: Registry[type[Metric]] = Registry(
    "metric",
    "trimtab.metrics",
    {
        "exact": "trimtab.evals.labels:Exact",
        "choice": "trimtab.evals.labels:Choice",
        "f1": "trimtab.evals.labels:LabelF1",
        "token_f1": "trimtab.evals.texts_alike:TokenF1",
        "rouge": "trimtab.evals.texts_alike:Rouge",
        "bleu": "trimtab.evals.texts_alike:Bleu",
        "chrf": "trimtab.evals.texts_alike:Chrf",
        "json": "trimtab.evals.json_fields:Json",
    },
)


def check_metrics(names: Sequence[str], references: Sequence[str]) -> None:
    """Raise at once what `compare` would raise after the answers are there.

    Raises:
        UnknownNameError: no such metric.
        ConfigError: a metric that does not fit these references, or whose library is not installed.
        DataError: there are no references.
    """
    chosen = [metrics.get(name)() for name in names]
    if chosen and not references:
        raise DataError("there are no references to compare answers with.")
    for metric in chosen:
        metric.check(references)


def compare(
    names: Sequence[str], references: Sequence[str], answers: Sequence[str]
) -> dict[str, Scores]:
    """The scores of each metric over pairs of a reference and an answer; raises as `check_metrics`."""
    if len(references) != len(answers):
        raise DataError(f"{len(answers)} answers were given for {len(references)} references.")
    check_metrics(names, references)
    return {name: metrics.get(name)().measure(references, answers) for name in names}


def values_of(scores: Mapping[str, Scores]) -> dict[str, Interval]:
    """All values of several metrics in one mapping."""
    return {name: value for one in scores.values() for name, value in one.values.items()}


def needs(kind: str, library: str) -> ConfigError:
    """The error of a metric whose library is not installed."""
    return ConfigError(
        f"metric {kind!r} needs {library}, which is not installed; pip install 'trimtab[metrics]'."
    )
