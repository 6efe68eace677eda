"""What tenants do in a soak but to answer: they come and go, learn, turn sick, are saved, loaded and moved."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

import trimtab as tt
from benchmarks import soak_laws
from benchmarks.soak_choices import (
    AIMS,
    DRAWS,
    METHODS,
    NAMES,
    TIERS,
    Deed,
    data,
    refused,
    tenant,
    text,
)
from benchmarks.soak_laws import GONE
from benchmarks.soak_world import MICRO, Charge, Work, World
from trimtab.adapt.active import Hold
from trimtab.adapt.bank import bank_of
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.engine.aims import Aim
from trimtab.errors import (
    AnswerError,
    DataError,
    DuplicateNameError,
    FileFormatError,
    NonFiniteLossError,
)
from trimtab.losses import ImportanceSampling
from trimtab.optim import AdamParams

# -- tenants come and go ------------------------------------------------------------------------------


def attach(world: World) -> None:
    """A new tenant; where the name is taken, an error."""
    name = world.draw.choice(NAMES)
    if name in world.charges:
        adapter = world.oracle.born(METHODS[0], 0)
        refused(world, DuplicateNameError, lambda: tt.attach(world.model, adapter, name))
    else:
        _arrive(world, name)


def _arrive(world: World, name: str) -> None:
    method = world.draw.choice(METHODS)
    adapter = world.oracle.born(method, world.draw.randrange(1000))
    tt.attach(world.model, adapter.detached(), name)
    twin = None
    if not method.startswith(DRAWS):
        if name not in world.twins:
            world.twins[name] = Engine(world.oracle.another(), micro_tokens=1 << 20)
        twin = world.twins[name]
        tt.attach(twin.model, adapter, name)
    world.charges[name] = Charge(name, method, twin)


def detach(world: World) -> None:
    """A tenant goes, whatever is in progress."""
    if (charge := tenant(world)) is not None:
        soak_laws.retire(world, charge.name)


def replace(world: World) -> None:
    """Another one comes under the same name, whatever is in progress."""
    if (charge := tenant(world)) is not None:
        soak_laws.retire(world, charge.name)
        _arrive(world, charge.name)


# -- training -----------------------------------------------------------------------------------------


def learn(world: World) -> None:
    """Gradients for several tenants."""
    for charge in world.draw.sample(list(world.charges.values()), min(3, len(world.charges))):
        aim = world.draw.choice(AIMS)
        _learn(world, charge, data(world, aim), aim)


def _learn(world: World, charge: Charge, given: Sequence[Datum], aim: Aim) -> None:
    name = charge.name
    work = Work(name, mirror=lambda engine: engine.forward_backward(given, name, aim))
    world.follow(work, world.desk.forward_backward(given, name, aim))


def step(world: World) -> None:
    """A step of one tenant; without gradients that is an error."""
    if (charge := tenant(world)) is None:
        return
    adam = AdamParams(
        lr=world.draw.choice([0.01, 0.05]), eps=1e-3, ema=world.draw.choice([None, 0.9])
    )
    name = charge.name
    work = Work(name, mirror=lambda engine: engine.optim_step(name, adam))
    world.follow(work, world.desk.optim_step(name, adam))


def average(world: World) -> None:
    """A tenant takes its moving averages, or somebody looks at them."""
    if (charge := tenant(world)) is None:
        return
    name, take = charge.name, world.draw.random() < 0.5

    def act(engine: Engine) -> None:
        if take:
            engine.take_average(name)
        else:
            with engine.averaged(name):
                pass

    world.follow(Work(name, mirror=act), world.desk.call(name, lambda: act(world.engine)))


def poison_data(world: World) -> None:
    """Examples that make a loss of no numbers."""
    if (charge := tenant(world)) is not None:
        ids = text(world, 5, 30)
        ones = [1.0] * len(ids)
        spoilt = Datum.causal(ids, ones, logprobs=[math.nan] * len(ids), advantages=ones)
        _learn(world, charge, [spoilt], ImportanceSampling())


def poison_values(world: World) -> None:
    """A tenant's values become no numbers."""
    charge = tenant(world)
    if charge is None:
        return
    name = charge.name

    def spoil(engine: Engine) -> None:
        engine.answering.drain(name)
        with torch.no_grad():
            for parameter in bank_of(engine.model).require(name).parameters():
                parameter.fill_(math.nan)

    world.follow(Work(name, mirror=spoil), world.desk.call(name, lambda: spoil(world.engine)))


def learn_together(world: World) -> None:
    """The engine's own verb, of all tenants in one call, when nothing else is to be done."""
    world.desk.run()
    soak_laws.settle(world)
    owners = [name for name, charge in world.charges.items() if charge.twin is not None] * 2
    given = [Datum.causal(ids := text(world, 4, 30), [1.0] * len(ids)) for _ in owners]
    if not given:
        return
    try:
        errors = world.engine.forward_backward(given, owners).errors
    except NonFiniteLossError as error:
        errors = {owners[0]: error}
    for name in dict.fromkeys(owners):
        own = [datum for datum, owner in zip(given, owners, strict=True) if owner == name]
        twin = world.charges[name].twin
        assert twin is not None
        if name in errors:
            refused(world, NonFiniteLossError, partial(twin.forward_backward, own, name))
        else:
            twin.forward_backward(own, name)


def learn_wrongly(world: World) -> None:
    """Data that cannot be learnt from, which is said at once."""
    if (charge := tenant(world)) is None:
        return
    plain = data(world, "cross_entropy")
    ids = world.draw.choice([[5] * (MICRO + 2), [3, 1 << 20, 4], [3, 4, -7]])
    wrong = [Datum.causal(ids, [1.0] * len(ids))]
    for given, loss in ((wrong, "cross_entropy"), (plain[:1], "dpo"), (plain, "ppo")):
        refused(world, DataError, partial(world.desk.forward_backward, given, charge.name, loss))


def scale(world: World) -> None:
    """A tenant goes less far from now on, or is left out of blocks, in its own order."""
    if (charge := tenant(world)) is None:
        return
    name, far, blocks = charge.name, *world.draw.choice([(0.5, 0), (1.5, 0), (1.0, 1), (1.0, 0)])

    def change(engine: Engine) -> None:
        if engine is world.engine:
            world.excuse(name, AnswerError)
        tt.scale(engine.model, name, far)
        if far == 1.0:
            tt.drop_layers(engine.model, name, blocks)

    if not any(word in charge.method for word in ("prefix", "prompt", "llama")):
        work = Work(name, mirror=change)
        world.follow(work, world.desk.call(name, lambda: change(world.engine)))


# -- states -------------------------------------------------------------------------------------------


def _state(world: World, charge: Charge, who: str) -> Path:
    return world.folder / "states" / f"{charge.name}-{METHODS.index(charge.method)}-{who}"


def save(world: World) -> None:
    """A tenant's state, with its gradients so far."""
    if (charge := tenant(world)) is None:
        return
    name = charge.name

    def put(engine: Engine, who: str) -> None:
        bank_of(engine.model).require(name)
        engine.save(name, _state(world, world.charges[name], who))  # of who has the name by then

    work = Work(name, set(GONE), mirror=lambda engine: put(engine, "twin"))
    world.follow(work, world.desk.call(name, lambda: put(world.engine, "own")))


def load(world: World) -> None:
    """A state of such a tenant is taken up; a torn one is not."""
    if (charge := tenant(world)) is None:
        return
    own, twin = _state(world, charge, "own"), _state(world, charge, "twin")
    if not (own.is_dir() and (charge.twin is None or twin.is_dir())):
        return
    if world.draw.random() < 0.5:
        own = twin = _torn(world, own)
    name, method = charge.name, charge.method

    def take(engine: Engine, folder: Path) -> None:
        bank_of(engine.model).require(name)  # a state would be attached
        if world.charges[name].method != method:
            raise FileFormatError("it is of another method by now")
        engine.load(folder, name)

    work = Work(name, mirror=lambda engine: take(engine, twin))
    world.follow(work, world.desk.call(name, lambda: take(world.engine, own)))


def _torn(world: World, folder: Path) -> Path:
    """A copy of a state whose one file is shorter, or not there."""
    torn = folder.with_name("torn")
    shutil.rmtree(torn, ignore_errors=True)
    shutil.copytree(folder, torn)
    files = sorted(path for path in torn.rglob("*") if path.suffix in (".safetensors", ".json"))
    file = world.draw.choice([file for file in files if file.name != "trimtab.json"])
    if world.draw.random() < 0.3:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return torn


def trip(world: World) -> None:
    """A tenant goes down to host memory or disk, and comes back."""
    if (charge := tenant(world)) is None:
        return
    name, to = charge.name, world.draw.choice(TIERS)

    def away() -> None:
        bank_of(world.model).require(name)
        world.excuse(name, *GONE)  # who answers meanwhile is another one then
        now = world.charges[name]
        if not now.adopted:
            world.yard.adopt(name)
            now.adopted = True
        world.yard.lower(name, to)
        while not isinstance(held := world.yard.hold(name), Hold):
            world.yard.wait(10)
        held.release()

    world.follow(Work(name, set(GONE)), world.desk.call(name, away))


DEEDS: Mapping[Deed, int] = {
    attach: 10,
    detach: 2,
    replace: 2,
    learn: 14,
    step: 10,
    average: 1,
    poison_data: 2,
    poison_values: 1,
    scale: 2,
    learn_wrongly: 2,
    learn_together: 2,
    save: 3,
    load: 3,
    trip: 2,
}
"""How often each is done, among all."""
