"""One base and any number of adapters on it, measured on the same data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trimtab.adapt.bank import bank_of
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import DataError
from trimtab.evals.answers import answer, questions, some
from trimtab.evals.held_out import HeldOut, held_out
from trimtab.evals.intervals import Interval
from trimtab.evals.metrics import Scores, check_metrics, compare, values_of
from trimtab.models.load import Base

MICRO_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one adapter, or the bare base (``adapter`` None), reached.

    ``held_out`` is None where no data were given; ``metrics`` are all values by name, ``scores`` the same with
    tables by class or field, by metric; ``answers`` those compared, in the order of the data. ``seconds`` is the
    time of measuring.
    """

    adapter: str | None
    held_out: HeldOut | None = None
    metrics: Mapping[str, Interval] = field(default_factory=dict)
    scores: Mapping[str, Scores] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    seconds: float = 0.0

    def fields(self) -> dict[str, Any]:
        """As JSON holds it."""
        found: dict[str, Any] = {"adapter": self.adapter, "seconds": round(self.seconds, 3)}
        if self.held_out is not None:
            found["loss"] = asdict(self.held_out.loss)
            found["accuracy"] = asdict(self.held_out.accuracy)
        found["metrics"] = {name: asdict(value) for name, value in self.metrics.items()}
        for scores in self.scores.values():
            if scores.classes is not None:
                found["classes"] = asdict(scores.classes)
            if scores.fields:
                found["fields"] = {name: asdict(value) for name, value in scores.fields.items()}
        return found


def evaluate(
    base: Base,
    data: Sequence[Datum],
    adapters: Sequence[str | None] = (None,),
    *,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    asked: int | None = None,
    max_tokens: int | None = None,
) -> list[Evaluation]:
    """Measure adapters that are attached to ``base`` on ``data``, one after the other.

    Args:
        data: the examples; loss and token accuracy are over their trained tokens, and the last trained run of
            each is the reference of its answer.
        adapters: names; None is the bare base.
        metrics: names of `trimtab.evals.metrics`; answers are greedy. Without one, only the loss is measured.
        limit: how many of the examples are used; ``asked``: how many of those are answered (see `some`).
        max_tokens: most tokens of an answer; by default those of the longest reference.

    Raises:
        DataError: no data, or an example longer than the model's context.
        UnknownNameError: no such metric or adapter (`AttachError` where none is attached).
        ConfigError: a metric that does not fit the data. All this is raised before anything is measured.
    """
    used = some(data, limit)
    if not used:
        raise DataError("there are no examples to evaluate on.")
    engine = Engine(base, micro_tokens=max(MICRO_TOKENS, *map(len, used)))
    metrics = tuple(dict.fromkeys(metrics))
    to_answer = questions(some(used, asked), base.tokenizer, engine.labels)
    references = [question.reference for question in to_answer]
    check_metrics(metrics, references)
    for name in adapters:
        if name is not None:
            bank_of(base.model).require(name)
    done = []
    for name in adapters:
        began = time.perf_counter()
        loss = held_out(engine, used, name)
        texts = answer(engine, to_answer, name, max_tokens=max_tokens) if metrics else []
        scores = compare(metrics, references, texts) if metrics else {}
        seconds = time.perf_counter() - began
        done.append(
            Evaluation(name, loss, values_of(scores), scores, tuple(texts), seconds=seconds)
        )
    return done


def merged(rows: Sequence[Evaluation], others: Sequence[Evaluation]) -> list[Evaluation]:
    """Two measurements of the same adapters as one: all metrics of both, and the time of both."""
    return [
        replace(
            one,
            metrics={**one.metrics, **other.metrics},
            seconds=one.seconds + other.seconds,
        )
        for one, other in zip(rows, others, strict=True)
    ]
