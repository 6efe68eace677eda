"""One measurement of an adapter, or of the bare base, as a run notes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.evals import (
    Accuracy,
    HeldOut,
    Interval,
    Question,
    answer,
    check_metrics,
    compare,
    held_out,
    questions,
    score,
    some,
    values_of,
)
from trimtab.train.recipe import EvalRecipe

EACH = ("samples", "sums", "weights")
"""What `Measured.fields` says of single examples."""
JUDGES: tuple[Literal["choice", "exact"], ...] = ("choice", "exact")
"""Metrics that say of each single answer whether it is right, the preferred one first."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, what should follow, and what did."""

    prompt: str
    reference: str
    answer: str
    correct: bool | None
    origin: str


@dataclass(frozen=True, slots=True)
class Measured:
    """``answers`` is None where no metric tells right from wrong; ``metrics`` are all values by name."""

    held_out: HeldOut
    answers: Accuracy | None
    samples: tuple[Sample, ...]
    metrics: Mapping[str, Interval] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """As an event holds it."""
        return {
            "loss": asdict(self.held_out.loss),
            "accuracy": asdict(self.held_out.accuracy),
            "answers": None if self.answers is None else asdict(self.answers),
            "metrics": {name: asdict(value) for name, value in self.metrics.items()},
            "samples": [asdict(sample) for sample in self.samples],
            "sums": list(self.held_out.sums),
            "weights": list(self.held_out.weights),
        }

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Measured:
        """What `fields` gave; older events have no ``metrics``, and no ``sums``."""
        answers = fields["answers"]
        return cls(
            HeldOut(
                Interval(**fields["loss"]),
                Interval(**fields["accuracy"]),
                tuple(fields.get("sums", ())),
                tuple(fields.get("weights", ())),
            ),
            None
            if answers is None
            else Accuracy(**{**answers, "interval": Interval(**answers["interval"])}),
            tuple(Sample(**sample) for sample in fields["samples"]),
            {name: Interval(**value) for name, value in fields.get("metrics", {}).items()},
        )


class Measure:
    """Measures on one set of held-out data.

    Args:
        data: the held-out examples.
        recipe: which metrics, how many answers.

    Raises:
        ConfigError: a metric that does not fit these data, or whose library is not installed.
    """

    def __init__(
        self,
        engine: Engine,
        data: Sequence[Datum],
        tokenizer: PreTrainedTokenizerBase,
        recipe: EvalRecipe,
    ) -> None:
        self._engine = engine
        self._data = data
        self._tokenizer = tokenizer
        self._recipe = recipe
        asked = questions(data, tokenizer, engine.labels)
        self._longest = max(question.length for question in asked)
        self._asked = some(asked, recipe.limit if recipe.metrics else recipe.samples)
        self._references = [question.reference for question in self._asked]
        check_metrics(recipe.metrics, self._references)

    def quick(self, adapter: str | None) -> Measured:
        """Loss and token accuracy only: what is watched while training."""
        found = held_out(self._engine, self._data, adapter)
        return Measured(HeldOut(found.loss, found.accuracy), None, ())

    def full(self, adapter: str | None) -> Measured:
        """The loss, the metrics of the recipe, and a few answers."""
        recipe, asked = self._recipe, self._asked
        loss = held_out(self._engine, self._data, adapter)
        most = recipe.max_tokens or self._longest
        texts = answer(self._engine, asked, adapter, max_tokens=most)
        found = values_of(compare(recipe.metrics, self._references, texts))
        judge = next((name for name in JUDGES if name in recipe.metrics), None)
        accuracy: Accuracy | None = None
        right: list[bool | None] = [None] * len(asked)
        if judge is not None:
            accuracy, done = score(asked, texts, judge)
            right = [one.correct for one in done]
        shown = some(self._samples(asked, texts, right), recipe.samples)
        return Measured(loss, accuracy, tuple(shown), found)

    def _samples(
        self, asked: Sequence[Question], texts: Sequence[str], correct: Sequence[bool | None]
    ) -> list[Sample]:
        return [
            Sample(
                str(
                    self._tokenizer.decode(
                        q.prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False
                    )
                ),
                q.reference,
                text,
                right,
                q.origin,
            )
            for q, text, right in zip(asked, texts, correct, strict=True)
        ]
