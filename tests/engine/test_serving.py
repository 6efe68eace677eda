"""Requests in turns: who else is served, and how, changes nothing of what each one gets."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import trimtab as tt
from tests import tiny
from tests.engine import kit
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.bank import Plan, bank_of
from trimtab.adapt.route import Route
from trimtab.adapt.stack import Stack
from trimtab.engine import Engine, SamplingParams
from trimtab.engine.answering import Answering
from trimtab.engine.serve import Loop, Request
from trimtab.engine.serve.seats import Seats
from trimtab.errors import AnswerError, UnknownNameError, UnsupportedError
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import Prefix
from trimtab.methods.spottune import SpotTune
from trimtab.models.load import Base
from trimtab.optim import AdamParams

GREEDY = SamplingParams(max_tokens=12, temperature=0)
DRAWN = SamplingParams(max_tokens=10, temperature=1.4, top_p=0.95, seed=3)
METHODS = {
    "a": LoRA(rank=2),
    "b": "ia3",
    "prefix": Prefix(length=3),
    "prompt": "prompt(length=3)",
    "gated": SpotTune(inner="lora(rank=2)", blocks=1),
    "invoked": LoRA(rank=2, invocation=(9, 11)),
}
NAMES = (None, *METHODS)


@pytest.fixture(scope="module")
def base() -> Base:
    made = kit.base()
    engine = Engine(made)
    for name, method in METHODS.items():
        attach(made.model, method, name)
        for _ in range(3):
            engine.forward_backward(kit.datums(), name)
            engine.optim_step(name, AdamParams(lr=0.05))
    return made


def prompt_of(number: int) -> list[int]:
    """Texts of several lengths; some begin alike, one is longer than a page, some invoke."""
    start = [5, 9, 11] if number % 2 else [70, 80, 90, 100]
    return start + [(number * 31 + place * 7) % 400 for place in range(number * 6 % 41)]


def loop_of(engine: Engine) -> Loop:
    loop = engine.answering.loop
    assert loop is not None
    return loop


def request(engine: Engine, number: int, params: SamplingParams, name: str | None) -> Request:
    (made,) = engine.answering.requests(prompt_of(number), params, name)
    return made


def served(requests: Sequence[Request], loop: Loop) -> list[list[int]]:
    for one in requests:
        loop.submit(one)
    loop.finish(requests)
    return [list(one.completion().tokens) for one in requests]


WANTED: dict[tuple[int, str | None, str], list[int]] = {}


def wanted(base: Base, number: int, name: str | None, params: SamplingParams) -> list[int]:
    """What a request gets that is alone."""
    key = number, name, str(params)
    if key not in WANTED:
        engine = Engine(base)
        (WANTED[key],) = served([request(engine, number, params, name)], loop_of(engine))
    return WANTED[key]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_neighbours_turns_and_room_change_nothing(base: Base, data: st.DataObject) -> None:
    engine = Engine(base, sample_tokens=data.draw(st.sampled_from([96, 160, 1024])))
    loop = loop_of(engine)
    loop.prefill = data.draw(st.sampled_from([4, 33, 512]))
    loop.rows = data.draw(st.sampled_from([1, 3, 256]))
    chosen = data.draw(
        st.lists(
            st.tuples(st.integers(0, 9), st.sampled_from(NAMES), st.sampled_from([GREEDY, DRAWN])),
            min_size=1, max_size=9,
        )
    )  # fmt: skip
    made = [(request(engine, n, params, name), n, name, params) for n, name, params in chosen]
    for one, *_ in made:
        loop.submit(one)
        for _ in range(data.draw(st.integers(0, 3))):
            loop.turn()
    before = torch.get_rng_state()
    loop.finish([one for one, *_ in made])
    assert torch.equal(torch.get_rng_state(), before)
    for one, *who in made:
        assert one.tokens == wanted(base, *who), who
    assert not loop.busy and loop.ledger.read == 0


@pytest.mark.parametrize(
    "build", [tiny.gpt2, tiny.qwen3, tiny.mixtral, tiny.qwen3_moe, tiny.gemma3, tiny.mistral]
)
def test_families_whose_keys_and_values_lie_in_pages(build: Callable[[], PreTrainedModel]) -> None:
    engine = Engine(kit.base(build().eval()))
    assert engine.answering.paged(None)


@pytest.mark.parametrize("build", [tiny.falcon, tiny.bloom])
def test_other_families_are_answered_in_batches(build: Callable[[], PreTrainedModel]) -> None:
    engine = Engine(kit.base(build().eval()))
    assert not engine.answering.paged(None)
    assert len(engine.sample([[5, 9]], GREEDY)) == 1
    with pytest.raises(UnsupportedError, match="log-probabilities"):
        engine.sample([[5, 9]], GREEDY.replace(logprobs=0))


def test_what_stands_in_some_attentions_only_is_answered_in_batches() -> None:
    base = kit.base()
    attach(base.model, Prefix(length=3, layers=(1,)), "top")
    engine = Engine(base)
    assert engine.answering.paged(None) and not engine.answering.paged("top")
    both = engine.sample([[5, 9], [5, 9]], GREEDY, ["top", None])
    assert [one.prompt for one in both] == [0, 1]


def test_a_beginning_that_was_read_is_not_read_again(base: Base) -> None:
    engine = Engine(base)
    loop = loop_of(engine)
    text = [(7 * n) % 400 for n in range(80)]
    read: list[int] = []
    handle = base.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        for name, first in (
            ("a", 80),
            ("a", 16),
            ("b", 80),
            (None, 80),
            (None, 16),
            ("gated", 80),
            ("gated", 80),
        ):
            read.clear()
            (one,) = engine.answering.requests(text, GREEDY, name)
            served([one], loop)
            assert read[0] == first, name
    finally:
        handle.remove()


def test_another_version_finds_nothing_of_the_one_before() -> None:
    base = kit.base()
    attach(base.model, LoRA(rank=2), "a")
    engine = Engine(base)
    text = [(7 * n) % 400 for n in range(80)]
    engine.sample([text], GREEDY, "a")
    for _ in range(3):
        engine.forward_backward(kit.datums(), "a")
        engine.optim_step("a", AdamParams(lr=0.1))
    (again,) = engine.sample([text], GREEDY, "a")
    assert again == Engine(base).sample([text], GREEDY, "a")[0]


def test_another_adapter_of_that_name_finds_nothing_of_the_one_before() -> None:
    """Not even where its tensors lie where the other's lay."""
    base = kit.base()
    engine = Engine(base)
    text = [(7 * n) % 400 for n in range(80)]
    for seed in range(5):
        adapter = attach(base.model, LoRA(rank=2), "a")
        with torch.no_grad():
            for tensor in adapter.tensors.values():
                tensor.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        del adapter
        found, fresh = (each.sample([text], GREEDY, "a") for each in (engine, Engine(base)))
        assert found == fresh
        detach(base.model, "a")
        gc.collect()


def test_several_completions_of_a_prompt_read_it_once(base: Base) -> None:
    engine = Engine(base)
    read: list[int] = []
    handle = base.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    text = [(7 * n) % 400 for n in range(65)]
    params = DRAWN.replace(n=4)
    loop_of(engine)
    read.clear()
    try:
        engine.sample([text], params, "a")
    finally:
        handle.remove()
    assert read[0] == 65 and sum(n for n in read if n > 4) == 65
    answers = engine.sample([text], params, "a")
    assert len({one.tokens for one in answers}) > 1


def test_log_probabilities_are_the_models(base: Base) -> None:
    params = DRAWN.replace(logprobs=3)
    engine = Engine(base)
    prompts = [prompt_of(2), prompt_of(7)]
    for answer, prompt, name in zip(
        engine.sample(prompts, params, ["a", "prefix"]), prompts, ["a", "prefix"], strict=True
    ):
        ids = [*prompt, *answer.tokens]
        with engine._answering(Route.everyone((name,)), None), torch.no_grad():
            logs = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert answer.logprobs is not None and answer.likeliest is not None
        for place, (token, said, best) in enumerate(
            zip(answer.tokens, answer.logprobs, answer.likeliest, strict=True)
        ):
            own = logs[len(prompt) - 1 + place]
            assert said == pytest.approx(float(own[token]), abs=1e-4)
            assert list(best) == own.topk(3).indices.tolist()


def test_all_log_probabilities_are_given_where_more_are_asked_for(base: Base) -> None:
    (answer,) = Engine(base).sample([[5, 9]], GREEDY.replace(logprobs=10**6, max_tokens=2), "a")
    assert answer.likeliest is not None
    assert [len(each) for each in answer.likeliest] == [kit.VOCABULARY] * 2


# -- faults --------------------------------------------------------------------------------------------


def test_cancelled_in_the_middle_of_its_prompt(base: Base) -> None:
    engine = Engine(base)
    loop = loop_of(engine)
    loop.prefill = 8
    one, other = (request(engine, n, GREEDY, "a") for n in (6, 3))
    loop.submit(one)
    loop.submit(other)
    loop.turn()
    assert 0 < one.read < len(one.prompt)
    one.cancel()
    loop.finish([other])
    assert one.completion().finish == "cancelled" and one.completion().tokens == ()
    assert other.tokens == wanted(base, 3, "a", GREEDY)
    assert loop.ledger.read == 0


def test_taken_out_while_it_answers() -> None:
    base = kit.base()
    attach(base.model, LoRA(rank=2), "a")
    attach(base.model, "ia3", "b")
    engine = Engine(base)
    loop = loop_of(engine)
    one, other = request(engine, 1, GREEDY, "a"), request(engine, 2, GREEDY, "b")
    alone = engine.sample([prompt_of(2)], GREEDY, "b")[0].tokens
    for each in (one, other):
        loop.submit(each)
    loop.turn()
    detach(base.model, "a")
    loop.finish([other])
    assert tuple(other.tokens) == alone
    with pytest.raises(UnknownNameError, match="'a' was taken out"):
        one.completion()


@pytest.mark.parametrize("method", [LoRA(rank=2), "ia3"], ids=["in a slot", "by name"])
def test_replaced_while_it_answers(method: LoRA | str) -> None:
    base = kit.base()
    attach(base.model, method, "a")
    attach(base.model, "ia3", "b")
    engine = Engine(base)
    loop = loop_of(engine)
    one, other = request(engine, 1, GREEDY, "a"), request(engine, 2, GREEDY, "b")
    alone = engine.sample([prompt_of(2)], GREEDY, "b")[0].tokens
    for each in (one, other):
        loop.submit(each)
    loop.turn()
    detach(base.model, "a")
    new = attach(base.model, method, "a")
    with torch.no_grad():
        for tensor in new.tensors.values():
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    (later,) = engine.sample([prompt_of(1)], GREEDY, "a")
    loop.finish([other])
    assert later == Engine(base).sample([prompt_of(1)], GREEDY, "a")[0]
    assert tuple(other.tokens) == alone
    with pytest.raises(UnknownNameError, match="'a' was taken out or replaced"):
        one.completion()
    assert loop.ledger.read == 0


def test_numbers_that_are_none_fail_their_own_request_alone(base: Base) -> None:
    made = kit.base()
    sick = attach(made.model, LoRA(rank=2), "sick")
    attach(made.model, LoRA(rank=2), "well")
    with torch.no_grad():
        for tensor in sick.tensors.values():
            tensor.fill_(float("nan"))
    engine = Engine(made)
    loop = loop_of(engine)
    names = ["sick", "well", None]
    ones = [request(engine, 6, GREEDY, name) for name in names]
    for one in ones:
        loop.submit(one)
    loop.finish(ones)
    with pytest.raises(AnswerError, match="'sick' gives logits that are not finite"):
        ones[0].completion()
    again = [request(engine, 6, GREEDY, name) for name in names[1:]]
    assert served(again, loop) == [list(one.tokens) for one in ones[1:]]
    assert loop.ledger.read == 0


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_numbers_that_are_none_are_no_answer_in_batches_either(params: SamplingParams) -> None:
    base = kit.base()
    sick = attach(base.model, Prefix(length=3, layers=(1,)), "sick")
    engine = Engine(base)
    assert not engine.answering.paged("sick") and engine.sample([[5, 9]], params, "sick")
    with torch.no_grad():
        for tensor in sick.tensors.values():
            tensor.fill_(float("nan"))
    with pytest.raises(AnswerError, match="logits that are not finite"):
        engine.sample([[5, 9], [7]], params, ["sick", None])
    with pytest.raises(AnswerError, match="logits that are not finite"):
        list(engine.stream([5, 9], params, "sick"))
    assert engine.sample([[7]], params)


def test_a_forward_that_fails_fails_for_its_own_requests(base: Base) -> None:
    engine = Engine(base)
    loop = loop_of(engine)
    ones = [request(engine, 3, GREEDY, name) for name in ("a", "b", None)]
    for one in ones:
        loop.submit(one)
    loop.turn()
    real = loop.scope

    def broken(route: Route, plan: Plan) -> AbstractContextManager[None]:
        if ("b",) in route.owners:
            raise RuntimeError("out of luck")
        return real(route, plan)

    loop.scope = broken
    loop.finish(ones)
    with pytest.raises(RuntimeError, match="out of luck"):
        ones[1].completion()
    assert ones[0].tokens == wanted(base, 3, "a", GREEDY)
    assert ones[2].tokens == wanted(base, 3, None, GREEDY)


def test_more_than_all_pages_hold_is_refused_at_once(base: Base) -> None:
    engine = Engine(base, sample_tokens=64)
    with pytest.raises(AnswerError, match="raise the engine's sample_tokens"):
        engine.sample([[1] * 60], SamplingParams(max_tokens=20, temperature=0))
    assert engine.sample([[1] * 40], GREEDY)


def test_more_requests_than_pages_wait(base: Base) -> None:
    engine = Engine(base, sample_tokens=96)
    names = [NAMES[n % len(NAMES)] for n in range(10)]
    loop = loop_of(engine)
    ones = [request(engine, n, GREEDY, name) for n, name in enumerate(names)]
    found = served(ones, loop)
    assert found == [wanted(base, n, name, GREEDY) for n, name in enumerate(names)]


def test_left_in_the_middle(base: Base) -> None:
    engine = Engine(base)
    loop = loop_of(engine)
    handle = base.model.register_forward_pre_hook(stop := Stop(5))
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.sample([prompt_of(n) for n in range(4)], GREEDY, "a")
    finally:
        handle.remove()
    assert stop.left < 0 and not loop.busy and loop.ledger.read == 0
    assert list(engine.sample([prompt_of(1)], GREEDY, "a")[0].tokens) == wanted(
        base, 1, "a", GREEDY
    )


class Stop:
    """Interrupts a forward."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", [LoRA(rank=2), "ia3"], ids=["in a slot", "by name"])
def test_an_answer_has_one_version_of_its_adapter(method: LoRA | str) -> None:
    made = kit.base()
    attach(made.model, method, "a")
    engine = Engine(made)
    for _ in range(3):
        engine.forward_backward(kit.datums(), "a")
        engine.optim_step("a", AdamParams(lr=0.05))
    whole = engine.sample([prompt_of(3)], GREEDY, "a")[0]
    with engine.stream(prompt_of(3), GREEDY, "a") as stream:
        pieces = [next(stream)]
        engine.forward_backward(kit.datums(), "a")
        engine.optim_step("a", AdamParams(lr=0.3))
        later = engine.sample([prompt_of(3)], GREEDY, "a")[0]
        pieces += stream
    assert stream.completion.tokens == whole.tokens != later.tokens
    assert "".join(pieces) == whole.text
    assert engine.sample([prompt_of(3)], GREEDY, "a")[0] == later


@pytest.mark.parametrize("method", [LoRA(rank=2), "ia3"], ids=["in a slot", "by name"])
@pytest.mark.parametrize("change", [tt.scale, tt.drop_layers])
def test_an_answer_goes_as_far_as_when_it_began(
    method: LoRA | str, change: Callable[..., None]
) -> None:
    made = kit.base()
    adapter = attach(made.model, method, "a")
    with torch.no_grad():
        for number, tensor in enumerate(adapter.tensors.values()):
            tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    engine, params = Engine(made), GREEDY.replace(max_tokens=40)
    (whole,) = engine.sample([prompt_of(3)], params, "a")
    loop_of(engine).ledger.forget()
    (one,) = engine.answering.submitted([prompt_of(3)], params, "a")
    for _ in range(3):
        loop_of(engine).turn()
    change(made.model, "a", 2)
    loop_of(engine).finish([one])
    change(made.model, "a", 1 if change is tt.scale else 0)
    if one.slot == -1:  # those in slots answer as they began
        with pytest.raises(AnswerError, match="was scaled, or left out of other blocks"):
            one.completion()
    else:
        assert one.completion() == whole
    (again,) = engine.sample([prompt_of(3)], params, "a")
    assert again == whole


def test_an_answer_in_progress_is_not_of_averages() -> None:
    made = kit.base()
    attach(made.model, "ia3", "a")
    engine = Engine(made)
    for _ in range(4):
        engine.forward_backward(kit.datums(), "a")
        engine.optim_step("a", AdamParams(lr=0.3, ema=0.9))
    params = GREEDY.replace(max_tokens=30)
    plain = engine.sample([prompt_of(3)], params, "a")[0]
    with engine.stream(prompt_of(3), params, "a") as before:
        next(before)
        with engine.averaged("a"):
            averaged = engine.sample([prompt_of(3)], params, "a")[0]
            after = engine.stream(prompt_of(3), params, "a")
            next(after)
        list(before)
        list(after)
    assert before.completion == plain != averaged == after.completion


def test_slots_are_given_back(base: Base) -> None:
    engine = Engine(base)
    loop = loop_of(engine)
    stack = Stack.of(base.model)
    one, other = request(engine, 3, GREEDY, "a"), request(engine, 4, GREEDY, "b")
    for each in (one, other):
        loop.submit(each)
    loop.turn()
    assert [one.slot, other.slot] == [*Stack.of(base.model).slots, -1]
    loop.finish([one, other])
    assert not stack.slots and not Stack.of(base.model).slots


def test_more_adapters_than_slots_take_turns_or_act_by_name() -> None:
    base = kit.base()
    names = [f"lora_{n}" for n in range(4)]
    for n, name in enumerate(names):
        adapter = attach(base.model, LoRA(rank=2), name)
        with torch.no_grad():
            for tensor in adapter.tensors.values():
                tensor.normal_(std=0.2, generator=torch.Generator().manual_seed(n))
    engine = Engine(base)
    loop = loop_of(engine)
    alone = [engine.sample([prompt_of(3)], GREEDY, name)[0].tokens for name in names]
    assert len(set(alone)) == 4
    loop.seats = Seats(stack := Stack(base.model, budget=1))
    adapter = bank_of(base.model).require(names[0])
    while not stack.takes(adapter):
        stack.budget += 1024
    ones = [request(engine, 3, GREEDY, name) for name in names * 2]
    assert served(ones, loop) == [list(tokens) for tokens in alone * 2]


def test_the_answering_of_an_engine_is_made_once(base: Base) -> None:
    engine = Engine(base)
    assert isinstance(engine.answering, Answering)
    assert engine.answering.loop is engine.answering.loop
