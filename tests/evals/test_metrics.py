"""Metrics against hand-worked examples and against the libraries' own corpus scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar, final, get_args

import numpy as np
import pytest

from trimtab.errors import ConfigError, DataError, UnknownNameError
from trimtab.evals import (
    Metric,
    Scores,
    bootstrap,
    check_metrics,
    compare,
    mean,
    metrics,
    values_of,
)
from trimtab.evals.json_fields import fields, parsed
from trimtab.evals.texts_alike import token_f1
from trimtab.train.recipe import EvalRecipe, MetricName

LONG = [
    ("The cat sat on the mat in the sun.", "the cat sat on a mat in the sun"),
    ("A ship turns by its trim tab.", "A ship turns with its small trim tab."),
    ("Nothing is as deep as the sea.", "The sea is deep."),
    ("It rained for three days and nights.", "It rained for three days and three nights."),
    ("One more line of text, to end with.", "Something else entirely was written here."),
]
REFERENCES, ANSWERS = ([pair[side] for pair in LONG] for side in (0, 1))


def scores(name: str, references: list[str], answers: list[str]) -> Scores:
    return compare([name], references, answers)[name]


def test_f1_by_class_macro_and_micro_are_those_worked_by_hand() -> None:
    #            references a: 4, b: 3, c: 1; answers in the same order, "?" is unreadable
    references = ["a", "a", "a", "a", "b", "b", "b", "c"]
    answers = ["a", "a", "b", "?", "b", "b.", "a", "b"]
    found = scores("f1", references, answers)
    # a: TP 2, FP 1, FN 2 -> 4/7; b: TP 2, FP 2, FN 1 -> 4/7; c: TP 0, FP 0, FN 1 -> 0
    assert found.values["f1_macro"].value == pytest.approx((4 / 7 + 4 / 7 + 0) / 3)
    # TP 4, FP 3, FN 4
    assert found.values["f1_micro"].value == pytest.approx(8 / 15)
    table = found.classes
    assert table is not None
    assert table.labels == ("a", "b", "c")
    assert table.confusion == ((2, 1, 0, 1), (1, 2, 0, 0), (0, 1, 0, 0))
    a, b, c = table.rows
    assert (a.precision.value, a.recall.value) == pytest.approx((2 / 3, 2 / 4))
    assert (b.precision.value, b.recall.value) == pytest.approx((2 / 4, 2 / 3))
    assert (c.precision.count, c.recall.value, c.f1) == (0, 0.0, 0.0)
    assert (a.references, a.answers, a.f1) == (4, 3, pytest.approx(4 / 7))
    for value in found.values.values():
        assert value.low < value.value < value.high
        assert value.count == 8


def test_micro_f1_of_readable_answers_is_accuracy() -> None:
    draw = np.random.default_rng(3)
    references, answers = (list(draw.choice(["x", "y", "z"], 200)) for _ in range(2))
    found = compare(["f1", "choice"], references, answers)
    share = found["choice"].values["choice"]
    assert found["f1"].values["f1_micro"].value == pytest.approx(share.value)
    # and the bootstrap interval of a share is near Wilson's
    micro = found["f1"].values["f1_micro"]
    assert (micro.low, micro.high) == pytest.approx((share.low, share.high), abs=0.02)


def test_bootstrap_repeats_and_fits_the_closed_form() -> None:
    draw = np.random.default_rng(0)
    values = list(draw.normal(3.0, 2.0, 400))
    found = mean(values)
    assert found == mean(values)
    spread = 1.96 * np.std(values, ddof=1) / 20
    assert found.value == pytest.approx(np.mean(values))
    assert found.high - found.value == pytest.approx(spread, rel=0.12)
    assert found.value - found.low == pytest.approx(spread, rel=0.12)
    assert mean([2.5]).low == mean([2.5]).high == 2.5
    with pytest.raises(DataError, match="no examples"):
        mean([])
    # draws in several portions cover all resamples: of the largest weight, not the first few
    wide = bootstrap([(float(n),) for n in range(3)], lambda sums: sums[:, 0], resamples=5000)
    assert (wide.low, wide.high) == (0.0, 6.0)


def test_token_f1_is_squads() -> None:
    assert token_f1("the cat sat", "a cat ran") == 0.5  # 1 of 2 and 2 words, articles apart
    assert token_f1("New York City", "new york") == pytest.approx(0.8)
    assert token_f1("yes yes", "yes") == pytest.approx(2 / 3)  # bags, not sets
    assert token_f1("...", "!") == 1.0
    assert token_f1("sea", "") == 0.0
    found = scores("token_f1", ["a b c", "d"], ["b c", "d"]).values["token_f1"]
    assert (found.value, found.count) == (pytest.approx(1.0), 2)


def test_rouge_is_the_librarys() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    np.random.seed(0)
    collected = BootstrapAggregator(n_samples=4000)
    for wanted, said in LONG:
        collected.add_scores(scorer.score(wanted, said))
    theirs = collected.aggregate()
    ours = scores("rouge", REFERENCES, ANSWERS).values
    for name in ("rouge1", "rouge2", "rougeL"):
        plain = np.mean([scorer.score(w, s)[name].fmeasure for w, s in LONG])
        assert ours[name].value == pytest.approx(plain, abs=1e-12)
        assert ours[name].low == pytest.approx(theirs[name].low.fmeasure, abs=0.03)
        assert ours[name].high == pytest.approx(theirs[name].high.fmeasure, abs=0.03)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_are_sacrebleus(name: str) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    metric = {"bleu": BLEU, "chrf": CHRF}[name]()
    whole = metric.corpus_score(ANSWERS, [REFERENCES])
    found = scores(name, REFERENCES, ANSWERS).values[name]
    assert found.value == pytest.approx(whole.score, abs=1e-9)
    assert found.low < found.value < found.high
    same = scores(name, REFERENCES, REFERENCES).values[name]
    assert (same.value, same.low) == pytest.approx((100.0, 100.0))
    # its own bootstrap, whose interval is mean ± half of the middle 95 %
    spread = metric.corpus_score(ANSWERS, [REFERENCES], n_bootstrap=1000)._ci
    assert (found.high - found.low) / 2 == pytest.approx(spread, rel=0.12)


def test_json_fields_are_compared_by_path_and_value() -> None:
    assert fields(parsed('{"a": {"b": [1, 2.0]}, "c": null, "d": []}')) == {
        "a.b[0]": "1", "a.b[1]": "2", "c": "null", "d": "[]",
    }  # fmt: skip
    assert fields({"a.b": 1}) != fields({"a": {"b": 1}})
    assert fields({"a": True}) != fields({"a": 1})
    references = [json.dumps(one) for one in ({"x": 1, "y": "s"}, {"x": 2, "y": "t"}, {"x": 3})]
    answers = ['{"y": "s", "x": 1.0}', ' {"x": 2, "y": "wrong", "z": 0}\n', 'x is 3, {"x": 3}']
    found = scores("json", references, answers)
    assert found.values["json_parsed"].value == pytest.approx(2 / 3)
    assert found.values["json_exact"].value == pytest.approx(1 / 3)
    # right: 2 + 1 + 0; fields: (2 + 2) + (3 + 2) + (0 + 1)
    assert found.values["json_fields"].value == pytest.approx(2 * 3 / 10)
    assert found.fields["x"].value == pytest.approx(2 / 3)
    assert (found.fields["y"].value, found.fields["y"].count) == (0.5, 2)
    for text in ('{"x": NaN}', "{'x': 1}", "", "```json\n{}\n```", "[" * 100_000):
        assert scores("json", ["{}"], [text]).values["json_parsed"].value == 0.0


def test_every_metric_of_a_recipe_is_registered_and_scores_perfect_answers_best() -> None:
    assert {"loss", *metrics.names()} == set(get_args(MetricName))
    texts = ['{"a": "one two three four five"}', '{"b": "six seven eight nine ten"}']
    for name in metrics.names():
        best = 100.0 if name in ("bleu", "chrf") else 1.0
        for value in scores(name, texts, texts).values.values():
            assert value.value == pytest.approx(best), name
    assert EvalRecipe(metric="loss").metrics == ()
    assert EvalRecipe.parse({"metric": ["f1", "loss", "choice", "f1"]}).metrics == ("f1", "choice")


@final
class Length(Metric):
    """The mean length of answers."""

    kind: ClassVar[str] = "length"

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        return Scores({"length": mean([len(text) for text in answers])})


def test_a_metric_of_another_package() -> None:
    metrics.add("length", Length)
    try:
        assert scores("length", ["a", "b"], ["abc", "a"]).values["length"].value == 2.0
    finally:
        metrics.remove("length")


def test_values_of_several_metrics() -> None:
    found = values_of(compare(["exact", "f1"], ["yes", "no"], ["yes", "yes"]))
    assert list(found) == ["exact", "f1_macro", "f1_micro"]


@pytest.mark.parametrize(
    ("name", "references", "error", "message"),
    [
        ("f1", ["yes", "Yes."], ConfigError, "all 2 references are 'yes'"),
        ("choice", ["yes"], ConfigError, "data with two labels or more"),
        ("f1", list(map(str, range(60))), ConfigError, "60 different answers"),
        ("json", ['{"a": 1}', "[1]"], ConfigError, "reference 2 of 2 is none: '\\[1\\]'"),
        ("rouge", ["да", "нет"], ConfigError, "use 'chrf'"),
        ("blue", ["a"], UnknownNameError, "Did you mean 'bleu'"),
        ("exact", [], DataError, "no references"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_anything_is_asked(
    name: str, references: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_metrics([name], references)
    with pytest.raises(error, match=message):
        compare([name], references, references)


@pytest.mark.parametrize(("name", "library"), [("rouge", "rouge-score"), ("bleu", "sacrebleu")])
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setattr("trimtab.evals.texts_alike.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"needs {library}.*trimtab\\[metrics\\]"):
        check_metrics([name], ["a"])


def test_one_answer_for_each_reference() -> None:
    with pytest.raises(DataError, match="1 answers were given for 2 references"):
        compare(["exact"], ["a", "b"], ["a"])
