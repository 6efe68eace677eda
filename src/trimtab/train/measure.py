"""One measurement of an adapter, or of the bare base, as a run notes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.evals import Accuracy, HeldOut, Interval, Question, answer, held_out, questions, score
from trimtab.train.recipe import EvalRecipe


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
    """``answers`` is None where only the loss was measured."""

    held_out: HeldOut
    answers: Accuracy | None
    samples: tuple[Sample, ...]

    def fields(self) -> dict[str, Any]:
        """As an event holds it."""
        return {
            "loss": asdict(self.held_out.loss),
            "accuracy": asdict(self.held_out.accuracy),
            "answers": None if self.answers is None else asdict(self.answers),
            "samples": [asdict(sample) for sample in self.samples],
        }

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Measured:
        """What `fields` gave."""
        answers = fields["answers"]
        return cls(
            HeldOut(Interval(**fields["loss"]), Interval(**fields["accuracy"])),
            None
            if answers is None
            else Accuracy(**{**answers, "interval": Interval(**answers["interval"])}),
            tuple(Sample(**sample) for sample in fields["samples"]),
        )


class Measure:
    """Measures on one set of held-out data.

    Args:
        data: the held-out examples.
        recipe: which metric, how many answers.
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
        self._asked = questions(data, tokenizer)
        self._longest = max(question.length for question in self._asked)

    def quick(self, adapter: str | None) -> Measured:
        """Loss and token accuracy only: what is watched while training."""
        return Measured(held_out(self._engine, self._data, adapter), None, ())

    def full(self, adapter: str | None) -> Measured:
        """The loss, the metric of the recipe, and a few answers."""
        recipe = self._recipe
        loss = held_out(self._engine, self._data, adapter)
        asked = (
            self._asked[: recipe.limit]
            if recipe.metric != "loss"
            else self._asked[: recipe.samples]
        )
        most = recipe.max_tokens or self._longest
        texts = answer(self._engine, asked, adapter, max_tokens=most)
        if recipe.metric == "loss":
            return Measured(loss, None, tuple(self._samples(asked, texts, [None] * len(asked))))
        accuracy, done = score(asked, texts, recipe.metric)
        shown = self._samples(asked, texts, [one.correct for one in done])[: recipe.samples]
        return Measured(loss, accuracy, tuple(shown))

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
