"""What is asked of an engine in a soak, rightly and wrongly: answers of tenants, of the base, and of those in tiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch

import trimtab as tt
from benchmarks import soak_laws
from benchmarks.soak_choices import METHODS, TIERS, Deed, paged, params, refused, text
from benchmarks.soak_laws import IDS, law
from benchmarks.soak_world import CONTEXT, Asked, Kept, OutOfLuckError, World
from trimtab.adapt.files import WEIGHTS
from trimtab.adapt.sources import AdapterFolder
from trimtab.engine import SamplingParams
from trimtab.errors import (
    AnswerError,
    AttachError,
    ConfigError,
    DataError,
    DuplicateNameError,
    FileFormatError,
    UnknownNameError,
)

# -- answers ------------------------------------------------------------------------------------------


def _who(world: World) -> str | None:
    return world.draw.choice([None, *world.charges, *world.charges])


def answer(world: World) -> None:
    """Prompts for the desk, of a tenant or the base."""
    name, how = _who(world), params(world)
    prompts = [text(world) for _ in range(world.draw.choice([1, 1, 2, 5]))]
    _ask(world, Asked(name, prompts=prompts, params=how))


def _ask(world: World, asked: Asked) -> None:
    if asked.name is not None:
        world.desk.call(asked.name, lambda: asked.begin(world.model))
    world.follow(asked, world.desk.sample(asked.prompts, asked.params, asked.name))


def crowd(world: World) -> None:
    """More than there are pages for."""
    how = SamplingParams(max_tokens=24, temperature=0)
    for _ in range(4):
        asked = Asked(_who(world), prompts=[text(world, 60, 100) for _ in range(3)], params=how)
        _ask(world, asked)


def request(world: World) -> None:
    """Requests that their owner may cancel."""
    name, how = _who(world), params(world)
    if not paged(world.charges.get(name or "")):
        return
    asked = Asked(name, prompts=[text(world, 1, 110)], params=how)
    asked.begin(world.model)
    asked.requests = world.engine.requests(asked.prompts, how, name)
    world.waiting.append(asked)


def cancel(world: World) -> None:
    """Requests and futures, wherever they are: waiting, being read, being answered."""
    asked = [asked for asked in world.waiting if asked.requests]
    for one in asked[: world.draw.randint(0, 2)]:
        world.draw.choice(list(one.requests)).cancel()
    queued = [each for each in (*world.waiting, *world.works) if each.future is not None]
    if queued and world.draw.random() < 0.3:
        future = world.draw.choice(queued).future
        assert future is not None
        future.cancel()


def stream(world: World) -> None:
    """A stream is begun, to its end where it is no request among others."""
    name, how = _who(world), params(world).replace(n=1, logprobs=None)
    asked = Asked(name, prompts=[text(world)], params=how)
    asked.stream = world.engine.stream(asked.prompts[0], how, name)
    asked.begin(world.model)
    world.waiting.append(asked)
    if not paged(world.charges.get(name or "")):
        soak_laws.finish(world, asked)
        return
    try:
        asked.pieces += islice(asked.stream, world.draw.randint(1, 4))
    except AnswerError:
        law(asked.kept is not None and asked.kept.sick, world, "a stream that fails")
        soak_laws.leave_stream(world, asked)


def stream_on(world: World) -> None:
    """A stream is read on, or left."""
    asked = next((asked for asked in world.waiting if asked.stream is not None), None)
    if asked is None:
        return
    if world.draw.random() < 0.5:
        soak_laws.finish(world, asked)
    else:
        soak_laws.leave_stream(world, asked)


def forward(world: World) -> None:
    """A plain forward of the model, of one for all rows or of one for each."""
    names = [_who(world), _who(world)]
    kept = [None if name is None else Kept.of(world.model, name) for name in names]
    if any(each is not None and each.sick for each in kept) or world.bank is None:
        return
    with torch.no_grad(), tt.rows(world.model, names):
        found = world.model(IDS).logits
    for row, each in enumerate(kept):
        alone = world.oracle.logits(each, IDS[row : row + 1])[0]
        count = min(len(alone), found.shape[1])  # a prompt before the other row is seen in both
        same = torch.allclose(found[row, -count:], alone[-count:], atol=1e-8)
        law(same, world, f"row {row} of {names}")


# -- what is refused ----------------------------------------------------------------------------------


def ask_wrongly(world: World) -> None:
    """What cannot be done is said at once, with nothing changed."""
    engine, name, greedy = world.engine, _who(world), SamplingParams(max_tokens=8, temperature=0)
    long = greedy.replace(max_tokens=CONTEXT)
    wrong: list[tuple[type[Exception], Callable[[], Any]]] = [
        (DataError, partial(engine.sample, [[]], greedy, name)),
        (DataError, partial(engine.sample, [[5] * CONTEXT], greedy, name)),
        (DataError, partial(engine.requests, [[5]], long, name)),
        (DataError, partial(engine.sample, [[3, 1 << 20]], greedy, name)),
        (DataError, partial(engine.stream, [3, -1], greedy, name)),
        (ConfigError, partial(greedy.replace, min_p=2.0)),
        (ConfigError, partial(greedy.replace, minp=0.1)),
        (UnknownNameError, partial(world.tiers.hold, "nobody")),
    ]
    refused(world, *world.draw.choice(wrong))


def fail(world: World) -> None:
    """The next forward fails, whosever it is."""
    armed = True

    def unlucky(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise OutOfLuckError("out of luck")

    world.excuse(None, OutOfLuckError)
    handle = world.model.register_forward_pre_hook(unlucky)
    try:
        world.turn()
    finally:
        handle.remove()


# -- those that only answer ---------------------------------------------------------------------------


def register(world: World) -> None:
    """An adapter that is to answer, in a folder or in host memory; or another one in the place of one."""
    name = f"t{world.draw.randrange(6)}"
    adapter = world.oracle.born(world.draw.choice(METHODS), world.draw.randrange(1000))
    adapter = adapter.detached(name=name)
    if world.draw.random() < 0.6:
        folder = world.folder / "shelf" / f"{name}.{world.done['register']}"
        source = AdapterFolder(adapter.save(folder))
        if name in world.shelf:
            refused(world, DuplicateNameError, lambda: world.tiers.register(name, source))
            world.tiers.replace(name, source)
        else:
            world.tiers.register(name, source)
        world.folders[name] = folder
    elif name in world.shelf:
        refused(world, DuplicateNameError, lambda: world.tiers.put(adapter))
        return
    else:
        try:
            world.tiers.put(adapter)
        except ConfigError:  # those that are up have taken all room
            world.errors["ConfigError"] += 1
            return
    world.shelf[name] = Kept(adapter)
    world.torn.discard(name)


def ask_registered(world: World) -> None:
    """One of them answers, as soon as there is room for it, by the values that its name has now."""
    names = [name for name, kept in world.shelf.items() if kept.paged]
    if not names:
        return
    name, how = world.draw.choice(names), params(world)
    asked = Asked(name, prompts=[text(world)], params=how, kept=world.shelf[name])
    if name in world.torn:
        asked.excuses.add(FileFormatError)
    try:
        asked.requests = world.engine.requests(asked.prompts, how, name)
    except FileFormatError as error:
        law(name in world.torn, world, f"{name!r} is whole: {error}")
        world.errors[type(error).__name__] += 1
        return
    world.waiting.append(asked)


def lower(world: World) -> None:
    """One of them goes down, unless it is held; or is forgotten, though it answers to the end of what was asked."""
    if not world.shelf:
        return
    name = world.draw.choice(list(world.shelf))
    if world.draw.random() < 0.5:
        try:
            world.tiers.lower(name, world.draw.choice(TIERS))
        except AttachError as error:
            world.errors[type(error).__name__] += 1
            asked = any(asked.name == name for asked in world.waiting)
            law(asked, world, f"{name!r} is held by nobody")
        return
    world.tiers.forget(name)
    refused(world, UnknownNameError, lambda: world.tiers.tier(name))
    del world.shelf[name]
    world.folders.pop(name, None)
    world.torn.discard(name)


def tear(world: World) -> None:
    """The file of one of them is torn, which matters when it is read again."""
    for name, folder in world.folders.items():
        if name not in world.torn:
            file = folder / WEIGHTS
            file.write_bytes(file.read_bytes()[:-20])
            world.torn.add(name)
            world.excuse(name, FileFormatError)
            return


def turn(world: World) -> None:
    """Time passes."""
    for _ in range(world.draw.randint(1, 6)):
        world.turn()
        soak_laws.settle(world)


DEEDS: Mapping[Deed, int] = {
    answer: 14,
    crowd: 2,
    request: 8,
    cancel: 6,
    stream: 6,
    stream_on: 4,
    forward: 3,
    ask_wrongly: 3,
    fail: 2,
    register: 3,
    ask_registered: 8,
    lower: 3,
    tear: 2,
    turn: 30,
}
"""How often each is done, among all."""
