"""Answers that are read while another thread makes them: what `sample` gives, in pieces, and no more than is wanted."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests import tiny
from tests.engine import kit
from tests.engine.test_desk import METHODS, STEP, made, prompt
from trimtab.adapt.attach import detach
from trimtab.adapt.bank import bank_of
from trimtab.engine import Engine, SamplingParams
from trimtab.engine.desk import Desk
from trimtab.engine.live import Live
from trimtab.errors import AnswerError, ConfigError, DataError, UnknownNameError

DRAWN = SamplingParams(max_tokens=24, temperature=1.2, seed=4)
WAYS = [
    DRAWN,
    DRAWN.replace(temperature=0.0),
    DRAWN.replace(stop=("e", "an")),
    DRAWN.replace(logprobs=1),
]


def asked(desk: Desk) -> Iterator[tuple[Live, SamplingParams, str | None, list[int]]]:
    for number, params in enumerate(WAYS):
        for name in (None, *METHODS):
            yield desk.stream(prompt(number), params, name), params, name, prompt(number)


def test_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    with Desk(engine) as desk:
        streams = list(asked(desk))
        learnt = desk.forward_backward(kit.datums(), "a")
        texts = ["".join(live) for live, *_ in streams]
        assert learnt.result(timeout=60)
    for (live, params, name, ids), text in zip(streams, texts, strict=True):
        (whole,) = engine.sample([ids], params, name)
        assert text == whole.text
        assert (live.completion.tokens, live.completion.finish) == (whole.tokens, whole.finish)
        assert (live.completion.logprobs is None) == (params.logprobs is None)
        assert next(live, None) is None


def test_in_coroutines() -> None:
    engine = made()

    async def read(live: Live) -> list[str]:
        return [piece async for piece in live]

    async def main(desk: Desk) -> None:
        streams = list(asked(desk))
        found = await asyncio.gather(*(read(live) for live, *_ in streams))
        await asyncio.get_running_loop().run_in_executor(None, desk.close)
        for (live, params, name, ids), pieces in zip(streams, found, strict=True):
            (whole,) = engine.sample([ids], params, name)
            assert "".join(pieces) == whole.text == live.completion.text
            assert all(pieces)

    asyncio.run(main(Desk(engine).start()))


def test_pieces_come_as_they_are_made() -> None:
    desk = Desk(made())
    live = desk.stream(prompt(2), DRAWN)
    assert live._piece() is None
    found: list[str] = []
    turns = 0
    while desk.turn():
        turns += 1
        if piece := live._piece():
            found.append(piece)
            assert len(live.completion.tokens) == turns
    assert turns > 10 and len(found) > 5
    assert "".join([*found, *live]) == live.completion.text


@pytest.mark.parametrize("way", ["close", "with", "lose", "break"])
def test_who_leaves_ends_it(way: str) -> None:
    engine = made()
    desk = Desk(engine)
    other = desk.sample([prompt(3)], DRAWN)
    live: Live | None = desk.stream(prompt(2), DRAWN, "b")
    assert live is not None
    desk.turn()
    (request,) = desk._answering[1].requests
    desk.turn()
    if way == "close":
        live.close()
        assert list(live) == []
    elif way == "with":
        with live:
            assert len(live.completion.tokens) == 0
        assert list(live) == []
    elif way == "break":
        for _ in live:
            break
        live = None
    else:
        live = None
    gc.collect()
    desk.turn()
    desk.turn()
    assert request.finish == "cancelled" and len(request.tokens) < 6 and not request.pages
    desk.run()
    assert other.result()[0] == engine.sample([prompt(3)], DRAWN)[0]


def test_who_leaves_before_it_began_costs_nothing() -> None:
    engine = made()
    assert engine.answering.paged("a")  # asked of the model once
    desk = Desk(engine)
    first = desk.forward_backward(kit.datums(3), "a")
    desk.stream(prompt(2), DRAWN, "a").close()
    after = desk.optim_step("a", STEP)
    forwards: list[int] = []
    with engine.model.register_forward_pre_hook(lambda *_: forwards.append(1)):
        desk.run()
    assert first.done() and after.result().step == 1
    assert not forwards  # training calls what is below the head


def test_a_coroutine_that_is_gone_wakes_nobody() -> None:
    desk = Desk(made())
    live = desk.stream(prompt(2), DRAWN)
    other = desk.sample([prompt(3)], DRAWN)

    async def wait() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(live), 0.01)

    asyncio.run(wait())  # the loop is closed, and the callback is there still
    desk.run()
    assert other.result()


def test_models_that_are_answered_in_batches() -> None:
    engine = Engine(kit.base(tiny.falcon(vocab_size=kit.VOCABULARY).eval()))
    for params in (DRAWN, DRAWN.replace(stop=("e",)), DRAWN.replace(temperature=0)):
        with Desk(engine) as desk:
            live = desk.stream(prompt(2), params)
            text = "".join(live)
        (whole,) = engine.sample([prompt(2)], params)
        assert text == whole.text and live.completion == whole


# -- faults --------------------------------------------------------------------------------------------


def test_what_is_wrong_is_raised_where_it_is_read() -> None:
    engine = made()
    with torch.no_grad():
        next(iter(bank_of(engine.model).require("b").parameters())).fill_(math.nan)
    with Desk(engine) as desk:
        with pytest.raises(ConfigError, match="a stream is one completion"):
            desk.stream(prompt(1), DRAWN.replace(n=2))
        streams = {
            UnknownNameError: desk.stream(prompt(1), DRAWN, "nobody"),
            DataError: desk.stream([1] * 200, DRAWN, "a"),
            AnswerError: desk.stream(prompt(1), DRAWN, "b"),
        }
        well = desk.stream(prompt(1), DRAWN, "a")
        for error, live in streams.items():
            with pytest.raises(error):
                list(live)
            assert list(live) == []  # it is said once
        assert "".join(well)


def test_taken_out_while_it_answers() -> None:
    engine = made()
    desk = Desk(engine)
    live = desk.stream(prompt(2), DRAWN, "a")
    for _ in range(8):
        desk.turn()
    desk.call(None, lambda: detach(engine.model, "a"))
    desk.run()
    assert next(live)  # what had come is read first
    with pytest.raises(UnknownNameError, match="taken out or replaced"):
        list(live)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    loop = engine.answering.loop
    assert loop is not None
    inside = threading.Event()

    def broken() -> None:
        inside.wait(60)
        raise MemoryError("no more of it")

    monkeypatch.setattr(loop, "turn", broken)
    desk = Desk(engine).start()
    live, waiting = desk.stream(prompt(2), DRAWN), desk.sample([prompt(1)], DRAWN)
    inside.set()
    with pytest.raises(AnswerError, match="thread has stopped, by MemoryError: no more of it"):
        list(live)
    with pytest.raises(AnswerError, match="has stopped"):
        waiting.result(timeout=60)
    with pytest.raises(AnswerError, match="closed"):
        desk.sample([prompt(1)], DRAWN)
    desk.close()


# -- who finds what ------------------------------------------------------------------------------------

LONG = [(7 * place) % 300 for place in range(80)]


@contextmanager
def first_read(engine: Engine) -> Iterator[list[int]]:
    """The lengths of what is read, the prompt's rest first."""
    lengths: list[int] = []
    with engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ):
        yield lengths


SHORT = SamplingParams(max_tokens=2, temperature=0)


@pytest.mark.parametrize("name", [None, "a", "b"])
def test_what_one_salt_has_read_another_does_not_find(name: str | None) -> None:
    engine = made()
    assert engine.answering.paged(name)
    order = [None, None, "x", "x", "y", "", "y", None]
    found = []
    for salt in order:
        with first_read(engine) as lengths:
            engine.sample([LONG], SHORT, name, salt=salt)
        found.append(lengths[0])
    assert found == [80, 16, 80, 16, 80, 80, 16, 16]


@pytest.mark.parametrize("way", ["stream", "desk", "desk's stream"])
def test_salts_of_other_ways(way: str) -> None:
    engine = made()
    desk = Desk(engine)
    (whole,) = engine.sample([LONG], SHORT, "a", salt="x")
    for salt, first in (("x", 16), ("y", 80), ("y", 16), (None, 80)):
        with first_read(engine) as lengths:
            if way == "stream":
                text = "".join(engine.stream(LONG, SHORT, "a", salt=salt))
            elif way == "desk":
                future = desk.sample([LONG], SHORT, "a", salt=salt)
                desk.run()
                text = future.result()[0].text
            else:
                live = desk.stream(LONG, SHORT, "a", salt=salt)
                desk.run()
                text = "".join(live)
        assert text == whole.text and lengths[0] == first
