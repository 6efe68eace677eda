"""Intervals against known values; answers against references."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.data import kit as data_kit
from tests.engine import kit
from trimtab.adapt.attach import attach
from trimtab.data import Datum, Renderer
from trimtab.engine import Engine
from trimtab.errors import ConfigError
from trimtab.evals import Question, answer, held_out, questions, ratio, score, wilson
from trimtab.evals.answers import chosen, normalised


def test_wilson() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ):
        found = wilson(hits, count)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
        assert found.value == hits / count
    assert wilson(29, 29).high == 1.0
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    assert wilson(90, 100).apart(wilson(50, 100))
    assert not wilson(55, 100).apart(wilson(50, 100))


def test_ratio() -> None:
    same = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (same.value, same.low, same.high, same.count) == (2.0, 2.0, 2.0, 3)
    mean = ratio([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert mean.value == 2.5
    assert mean.high - 2.5 == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2, rel=1e-3)  # of a plain mean
    assert ratio([3.0], [2.0]).high == 1.5


def test_normalised_and_chosen() -> None:
    assert normalised("  Yes,\n it  is. ") == "yes, it is"
    assert normalised("!") == "!"
    labels = Counter(["yes", "no", "no idea", "c++"])
    assert chosen("Yes.", labels) == "yes"
    assert chosen("No idea at all", labels) == "no idea"
    assert chosen("nothing", labels) is None
    assert chosen("C++11", labels) == "c++"
    assert chosen("", labels) is None


def asked(*references: str) -> list[Question]:
    return [Question((1,), reference, 2) for reference in references]


def test_score() -> None:
    accuracy, done = score(asked("yes", "no", "no", "no"), ["Yes!", "no", "maybe", "yes"], "choice")
    assert [one.correct for one in done] == [True, True, False, False]
    assert (accuracy.interval.value, accuracy.majority, accuracy.commonest) == (0.5, 0.75, "no")
    assert accuracy.unreadable == 1
    exact, _ = score(asked("Two words"), ["two words."], "exact")
    assert exact.interval.value == 1.0
    with pytest.raises(ConfigError, match="51 different answers"):
        score(asked(*map(str, range(51))), ["x"] * 51, "choice")


def test_questions_are_the_last_answer() -> None:
    tokenizer = data_kit.byte_level(data_kit.CHATML)
    renderer = Renderer(tokenizer)
    record = data_kit.chat("Is it?", "no", "And that?", "yes, deep")
    (question,) = questions([renderer.render(record).datum()], tokenizer)
    assert question.reference == "yes, deep"
    turns = [*record.messages[:-1]]
    assert list(question.prompt) == renderer.prompt(turns)
    plain = Datum.causal([1, 2, 3, 4], [0, 1, 1, 0.0])
    assert questions([plain], tokenizer)[0].prompt == (1,)
    assert questions([plain], tokenizer)[0].length == 2


def test_held_out_changes_nothing_and_answers_fit_the_context() -> None:
    base = kit.base(kit.llama(positions=32))
    adapter = attach(base.model, "lora(rank=2)", "a")
    engine = Engine(base)
    before = adapter.detached()
    data = kit.datums(6)
    measured = held_out(engine, data, "a")
    assert measured.loss.value == pytest.approx(engine.forward(data, "a").mean)
    assert measured.loss.low < measured.loss.value < measured.loss.high
    assert measured.accuracy.count == 6
    assert adapter == before
    texts = answer(engine, questions(data, base.tokenizer), "a", max_tokens=100)
    assert len(texts) == 6
    assert answer(engine, [], "a") == []
