"""The desk: in order for each adapter, joined across adapters, and what each gets is what it gets alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine import kit
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.bank import bank_of
from trimtab.data import Datum
from trimtab.engine import Engine, LossResult, SamplingParams
from trimtab.engine.desk import Desk, Policy
from trimtab.errors import (
    AnswerError,
    DataError,
    NonFiniteLossError,
    TrainingError,
    UnknownNameError,
)
from trimtab.losses import DPO
from trimtab.methods.lora import LoRA
from trimtab.optim import AdamParams

GREEDY = SamplingParams(max_tokens=6, temperature=0)
METHODS = {"a": LoRA(rank=2), "b": "ia3", "c": "prefix(length=3)"}
STEP = AdamParams(lr=0.05)


def made(*, micro_tokens: int = 64) -> Engine:
    base = kit.base()
    for name, method in METHODS.items():
        attach(base.model, method, name, seed=3)
    return Engine(base, micro_tokens=micro_tokens)


def prompt(number: int) -> list[int]:
    return [(7 * number + 5 * place) % 400 for place in range(3 + number)]


def asked(desk: Desk, engine: Engine, what: str, name: str, number: int) -> tuple[Future[Any], Any]:
    """The future of one thing asked, and the same done at once."""
    data = kit.datums(1 + number % 3, seed=number)
    if what == "learn":
        return desk.forward_backward(data, name), engine.forward_backward(data, name)
    if what == "step":
        return desk.optim_step(name, STEP), engine.optim_step(name, STEP)
    prompts = [prompt(number)]
    return desk.sample(prompts, GREEDY, name), engine.sample(prompts, GREEDY, name)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_each_adapter_gets_what_it_gets_alone(data: st.DataObject) -> None:
    one, other = made(), made()
    desk = Desk(one, Policy(tokens_between=data.draw(st.sampled_from([32, 64]))))
    learnt: set[str] = set()
    pairs = []
    for number in range(data.draw(st.integers(1, 14))):
        name = data.draw(st.sampled_from(list(METHODS)))
        what = data.draw(st.sampled_from(["learn", "step", "sample"]))
        if what == "step" and name not in learnt:
            continue
        learnt = (
            learnt | {name} if what == "learn" else learnt - ({name} if what == "step" else set())
        )
        pairs.append(asked(desk, other, what, name, number))
        for _ in range(data.draw(st.integers(0, 2))):
            desk.turn()
    desk.run()
    for future, wanted in pairs:
        found = future.result(timeout=0)
        if isinstance(wanted, LossResult):
            assert found.sums == pytest.approx(wanted.sums, rel=1e-4)
            assert [len(values) for values in found.logprobs] == [len(v) for v in wanted.logprobs]
        elif isinstance(wanted, list):
            assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]
        else:
            assert (found.step, found.weight) == (wanted.step, pytest.approx(wanted.weight))
    for name in METHODS:
        tensors = bank_of(other.model).require(name).tensors
        for key, tensor in bank_of(one.model).require(name).tensors.items():
            torch.testing.assert_close(tensor, tensors[key], rtol=1e-3, atol=1e-5)
    assert not desk.busy


class Calls:
    """How many tokens of whom each call of an engine learns from."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, int]] = []
        self._real = engine.forward_backward
        patch.setattr(engine, "forward_backward", self)

    def __call__(self, data: Sequence[Datum], owners: Sequence[str], loss: Any) -> LossResult:
        sizes: dict[str, int] = {}
        for datum, owner in zip(data, owners, strict=True):
            sizes[owner] = sizes.get(owner, 0) + len(datum)
        self.seen.append(sizes)
        return self._real(data, owners, loss)


def alike(count: int, length: int = 8) -> list[Datum]:
    return [Datum.causal([5 + n] * (length + 1), [1.0] * (length + 1)) for n in range(count)]


def test_shares_of_tokens_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(micro_tokens=64)
    calls = Calls(engine, monkeypatch)
    desk = Desk(engine)
    big = desk.forward_backward(alike(40), "a")
    small = desk.forward_backward(alike(4, length=16), "b")
    while not small.done():
        desk.turn()
    assert calls.seen == [{"a": 32, "b": 32}, {"a": 32, "b": 32}]
    desk.run()
    assert sum(seen["a"] for seen in calls.seen) == 40 * 8 and len(big.result().sums) == 40
    assert all(sum(seen.values()) == 64 for seen in calls.seen)


def test_a_unit_that_is_larger_than_a_share_saves_up_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = made(micro_tokens=64)
    calls = Calls(engine, monkeypatch)
    desk = Desk(engine)
    desk.forward_backward(alike(30), "a")
    desk.forward_backward(alike(3, length=60), "b")
    desk.run()
    shares = [sum(seen.get(name, 0) for seen in calls.seen[:6]) for name in "ab"]
    assert shares[1] == 180 and shares[0] >= 120


def test_pairs_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(micro_tokens=20)
    calls = Calls(engine, monkeypatch)
    desk = Desk(engine)
    found = desk.forward_backward(alike(6), "a", DPO())
    desk.run()
    assert calls.seen == [{"a": 16}] * 3 and len(found.result().losses) == 6


def test_training_leaves_room_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(micro_tokens=64)
    calls = Calls(engine, monkeypatch)
    desk = Desk(engine, Policy(train_share=0.5, tokens_between=16))
    answer = desk.sample([prompt(4)], GREEDY.replace(max_tokens=40), "b")
    learnt = desk.forward_backward(alike(40), "a")
    while not answer.done():
        desk.turn()
    *during, _ = calls.seen  # the last one came when the answer was done
    assert during and all(sum(seen.values()) <= 16 for seen in during)
    count = len(calls.seen)
    desk.run()
    assert learnt.done() and sum(calls.seen[count].values()) == 64


# -- faults --------------------------------------------------------------------------------------------


def test_numbers_that_are_none_fail_one_tenant() -> None:
    engine = made()
    with torch.no_grad():
        next(iter(bank_of(engine.model).require("b").parameters())).fill_(math.nan)
    desk = Desk(engine)
    data = kit.datums(4)
    futures = {name: desk.forward_backward(data, name) for name in METHODS}
    steps = {name: desk.optim_step(name, STEP) for name in "ac"}
    after = desk.sample([prompt(1)], GREEDY, "a")
    desk.run()
    with pytest.raises(NonFiniteLossError):
        futures["b"].result()
    for name in "ac":
        assert len(futures[name].result().sums) == 4 and steps[name].result().step == 1
    assert after.result()


def test_what_is_wrong_is_said_at_once_and_changes_nothing() -> None:
    engine = made()
    desk = Desk(engine)
    with pytest.raises(UnknownNameError, match="no adapter 'nobody'"):
        desk.forward_backward(kit.datums(1), "nobody")
    with pytest.raises(DataError, match="more than"):
        desk.forward_backward(alike(1, length=100), "a")
    assert not desk.busy
    too_long = desk.sample([[1] * 200], GREEDY, "a")
    step = desk.optim_step("a", STEP)
    well = desk.sample([prompt(2)], GREEDY, "a")
    desk.run()
    with pytest.raises(DataError, match="context"):
        too_long.result()
    assert step.exception() is not None  # there are no gradients
    assert well.result()


def test_taken_out_between_two_of_its_requests() -> None:
    engine = made()
    desk = Desk(engine)
    desk.call("a", lambda: detach(engine.model, "a"))
    late = desk.forward_backward(kit.datums(2), "a")
    other = desk.forward_backward(kit.datums(2), "b")
    desk.run()
    with pytest.raises(UnknownNameError):
        late.result()
    assert other.result().sums


def test_the_only_one_that_was_to_learn_is_taken_out() -> None:
    engine = made()
    desk = Desk(engine)
    desk.call("a", lambda: detach(engine.model, "a"))
    late = desk.forward_backward(kit.datums(2), "a")
    desk.run()
    with pytest.raises(UnknownNameError):
        late.result()


def test_replaced_while_it_learns() -> None:
    """Another adapter of that name does not learn the rest."""
    engine = made(micro_tokens=64)
    desk = Desk(engine)
    learnt = desk.forward_backward(alike(24), "a")
    desk.turn()
    detach(engine.model, "a")
    attach(engine.model, LoRA(rank=2), "a")
    step = desk.optim_step("a", STEP)
    desk.run()
    with pytest.raises(UnknownNameError, match="'a' was taken out or replaced while it learnt"):
        learnt.result()
    with pytest.raises(TrainingError, match="no gradients"):
        step.result()


def test_what_has_begun_to_learn_is_learnt_whole() -> None:
    engine = made(micro_tokens=64)
    desk = Desk(engine)
    learnt = desk.forward_backward(alike(24), "a")
    desk.turn()
    assert not learnt.cancel()
    step = desk.optim_step("a", STEP)
    desk.run()
    assert len(learnt.result().sums) == 24 and step.result().weight == 24 * 8


def test_what_cannot_be_learnt_to_its_end_leaves_nothing_behind() -> None:
    engine = made(micro_tokens=64)
    desk = Desk(engine)
    learnt = desk.forward_backward(alike(24), "a", DPO(reference="b"))
    desk.turn()
    detach(engine.model, "b")
    step = desk.optim_step("a", STEP)
    desk.run()
    with pytest.raises(UnknownNameError, match="'b'"):
        learnt.result()
    with pytest.raises(TrainingError, match="no gradients"):
        step.result()


def test_cancelled_before_it_began() -> None:
    engine = made()
    desk = Desk(engine)
    first, second = (desk.forward_backward(kit.datums(2), "a") for _ in range(2))
    assert second.cancel()
    desk.run()
    assert first.result().sums
    with pytest.raises(CancelledError):
        second.result()


def test_in_a_thread_of_its_own() -> None:
    engine, alone = made(), made()
    with Desk(engine) as desk:
        futures = [
            asked(desk, alone, what, name, 2)
            for name in METHODS
            for what in ("learn", "step", "sample")
        ]
        for future, wanted in futures:
            found = future.result(timeout=60)
            if isinstance(wanted, list):
                assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]
    with pytest.raises(AnswerError, match="closed"):
        desk.optim_step("a", STEP)
