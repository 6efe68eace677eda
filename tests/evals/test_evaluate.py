"""Several adapters on one base, measured on the same data; and what a run notes of a measurement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data import kit as data_kit
from tests.train import kit
from trimtab.adapt.attach import attach
from trimtab.data import Datum, Renderer, load_examples
from trimtab.engine import Engine
from trimtab.errors import AttachError, ConfigError, DataError, UnknownNameError
from trimtab.evals import evaluate, held_out, some
from trimtab.models.load import Base, load
from trimtab.train.measure import Measure, Measured
from trimtab.train.recipe import EvalRecipe


@pytest.fixture(scope="module")
def base(job: Path) -> Base:
    made = load(job / "model", dtype="float32")
    for name, method in (("a", "lora(rank=2)"), ("b", "ia3")):
        adapter = attach(made.model, method, name)
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                draw = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return made


@pytest.fixture(scope="module")
def data(base: Base, job: Path) -> list[Datum]:
    return list(load_examples(job / "held.jsonl", Renderer(base.tokenizer)))


def test_each_row_is_what_it_is_alone(base: Base, data: list[Datum]) -> None:
    rows = evaluate(base, data, (None, "a", "b"), metrics=("choice", "f1", "chrf"), max_tokens=3)
    assert [row.adapter for row in rows] == [None, "a", "b"]
    engine = Engine(base)
    for row in rows:
        assert row.held_out == held_out(engine, data, row.adapter)
        assert set(row.metrics) == {"choice", "f1_macro", "f1_micro", "chrf"}
        assert len(row.answers) == 12
        assert all(value.count == 12 for value in row.metrics.values())
        assert row.seconds > 0
    losses = {row.held_out.loss.value for row in rows if row.held_out is not None}
    assert len(losses) == 3
    (alone,) = evaluate(base, data, ("b",), metrics=("choice", "f1", "chrf"), max_tokens=3)
    assert (alone.metrics, alone.answers) == (rows[2].metrics, rows[2].answers)


def test_limit_and_loss_only(base: Base, data: list[Datum]) -> None:
    (row,) = evaluate(base, data, limit=5)
    assert row.held_out == held_out(Engine(base), some(data, 5), None)
    assert (row.metrics, row.answers) == ({}, ())
    assert row.fields()["loss"]["count"] == 5


def test_some_of_a_sorted_or_alternating_file_are_a_sample_of_it() -> None:
    in_order, in_turns = ["a"] * 200 + ["b"] * 200, ["a", "b"] * 200
    for items in (in_order, in_turns):
        assert 20 <= some(items, 60).count("a") <= 40
    assert some(range(9), 4) == sorted(set(some(range(9), 4)))
    assert some(in_turns, None) == some(in_turns, 400) == in_turns


def test_what_cannot_be_measured_is_said_at_once(base: Base, data: list[Datum]) -> None:
    with pytest.raises(UnknownNameError, match="no adapter 'c'"):
        evaluate(base, data, (None, "c"))
    with pytest.raises(ConfigError, match="JSON objects, and reference 1"):
        evaluate(base, data, metrics=("json",))
    with pytest.raises(UnknownNameError, match="Did you mean 'rouge'"):
        evaluate(base, data, metrics=("rogue",))
    with pytest.raises(DataError, match="no examples to evaluate"):
        evaluate(base, [])
    plain = Base(load_plain(base), base.tokenizer, "plain")
    with pytest.raises(AttachError, match="has no adapters"):
        evaluate(plain, data, ("a",))


def load_plain(base: Base) -> torch.nn.Module:
    return type(base.model)(base.model.config)


def test_an_event_holds_all_metrics_and_older_events_are_read(
    base: Base, data: list[Datum]
) -> None:
    recipe = EvalRecipe.parse({"metric": ["f1", "choice"], "samples": 2, "max_tokens": 3})
    measured = Measure(Engine(base), data, base.tokenizer, recipe).full("a")
    fields = measured.fields()
    assert set(fields["metrics"]) == {"f1_macro", "f1_micro", "choice"}
    assert set(fields["metrics"]["choice"]) == {"value", "low", "high", "count"}
    assert measured.answers is not None
    assert measured.answers.interval == measured.metrics["choice"]
    assert Measured.of(fields) == measured
    fields.pop("metrics")  # as before there were several metrics
    older = Measured.of(fields)
    assert (older.answers, older.samples, dict(older.metrics)) == (
        measured.answers,
        measured.samples,
        {},
    )


def test_a_run_refuses_a_metric_that_does_not_fit_before_it_trains(
    base: Base, data: list[Datum], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="JSON objects"):
        Measure(Engine(base), data, base.tokenizer, EvalRecipe(metric="json"))
    rows = [row | {"completion": "yes"} for row in kit.rows(4)]
    path = data_kit.write_jsonl(tmp_path / "one.jsonl", rows)
    one_label = load_examples(path, Renderer(base.tokenizer))
    with pytest.raises(ConfigError, match="all 4 references are 'yes'"):
        Measure(Engine(base), one_label, base.tokenizer, EvalRecipe(metric="f1"))


def test_a_change_is_told_example_by_example(base: Base, data: list[Datum]) -> None:
    """Only of the same examples."""
    engine = Engine(base)
    before, after = (held_out(engine, data, name) for name in (None, "a"))
    change = after.change(before)
    assert change is not None
    assert change.value == pytest.approx(after.loss.value - before.loss.value)
    assert change.low < change.value < change.high
    assert after.change(held_out(engine, data[1:], None)) is None
    itself = before.change(before)
    assert itself is not None and (itself.low, itself.high) == (0.0, 0.0)
