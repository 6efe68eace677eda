"""What must hold in a soak, whatever was done (`benchmarks.soak_world`).

of each answer      it is that of the adapter's values when the answer began, alone; or an error that something was
                    done for
of each tenant      its values, steps and weights are those of its twin, which did the same alone
of the base         not a bit has changed, and with nobody acting it says what it always said
of what is shared   when nobody is served no page, seat, slot or hold is taken, and no future is open
of memory           requests, streams and adapters that nobody has are gone
"""

from __future__ import annotations

import gc
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import torch

import trimtab as tt
from benchmarks.soak_world import (
    Asked,
    BrokenLawError,
    Charge,
    OutOfLuckError,
    Waiting,
    Work,
    World,
)
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import bank_of
from trimtab.engine.results import LossResult, StepResult
from trimtab.engine.sampling import Completion
from trimtab.engine.serve import Request
from trimtab.engine.streaming import Stream
from trimtab.errors import (
    AnswerError,
    AttachError,
    TrimtabError,
    UnknownNameError,
    UnsupportedError,
)

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""Of a tenant beside its twin: sums come in another order, and losses are computed in fp32."""
IDS = torch.arange(3, 35).view(2, 16)
PATIENCE = 20_000
"""Turns after which nothing more is expected."""
LEFT = 4 << 20
"""Bytes of tensors that may be there when everybody is gone: pages, and the bases of the twins."""
GONE = UnknownNameError, AttachError
"""What may come of what was asked of an adapter that was taken out; the second where it was the last."""


def law(holds: bool, world: World, what: str) -> None:
    """Raise where something does not hold."""
    if not holds:
        done = ", ".join(world.history)
        raise BrokenLawError(f"{what}\nthe last deeds: {done}")


# -- what came of what was asked ----------------------------------------------------------------------


def settle(world: World) -> None:
    """Look at all that has come by now."""
    while world.settled:
        waiting, charge = world.settled.popleft()
        if isinstance(waiting, Work):
            world.works.remove(waiting)
            _worked(world, waiting, charge)
        elif isinstance(waiting, Asked):
            _answered(world, waiting)
    for asked in [asked for asked in world.waiting if asked.future is None and asked.done()]:
        _answered(world, asked)


def _worked(world: World, work: Work, charge: Charge | None) -> None:
    """The twin does the same, and the same comes of it."""
    assert work.future is not None
    if work.future.cancelled():
        return
    error = work.future.exception()
    if error is not None:
        world.errors[type(error).__name__] += 1
    if isinstance(error, tuple(work.excuses)):
        if isinstance(error, OutOfLuckError) and charge is not None and charge.twin is not None:
            charge.twin.tenants.of(bank_of(charge.twin.model).require(charge.name)).discard()
        return
    if charge is None or charge.twin is None:
        known = error is None or (charge is not None and isinstance(error, TrimtabError))
        law(known, world, f"work for {work.name!r}: {error!r}")
        return
    try:
        wanted = work.mirror(charge.twin)
    except Exception as alone:
        law(type(alone) is type(error), world, f"{work.name!r}: {error!r}, and alone {alone!r}")
        return
    law(error is None, world, f"{work.name!r}: {error!r}, and alone it does")
    _alike(world, charge, work.future.result(), wanted)


def _alike(world: World, charge: Charge, found: Any, wanted: Any) -> None:
    if isinstance(wanted, LossResult):
        for name in ("sums", "weights", "losses"):
            one, other = (torch.tensor(getattr(each, name)) for each in (found, wanted))
            same = torch.allclose(one, other, rtol=1e-4, atol=1e-5)
            law(same, world, f"{charge.name!r}, {charge.method}: {name} {one}, and alone {other}")
    elif isinstance(wanted, StepResult):
        law(found.step == wanted.step, world, f"{charge.name!r}: {found}, and alone {wanted}")
        close = abs(found.weight - wanted.weight) < 1e-6 * max(1, wanted.weight)
        law(close, world, f"{charge.name!r}: {found}, and alone {wanted}")


def _answered(world: World, asked: Asked) -> None:
    """What was answered is right, or why it was not is known."""
    world.waiting.remove(asked)
    try:
        found = asked.completions()
    except CancelledError:
        return
    except Exception as error:
        world.errors[type(error).__name__] += 1
        sick = asked.kept is not None and asked.kept.sick and isinstance(error, AnswerError)
        batches = asked.kept is not None and not asked.kept.paged
        excused = sick or isinstance(error, tuple(asked.excuses))
        excused = excused or (batches and isinstance(error, UnsupportedError))
        law(excused, world, f"an answer of {asked.name!r}: {error!r}")
        return
    world.done["answers"] += len(found)
    check(world, asked, found)


def check(world: World, asked: Asked, found: list[Completion]) -> None:
    """Some answers against those alone."""
    params = asked.params
    law(len(found) == len(asked.prompts) * params.n, world, f"{len(found)} answers")
    seeded = params.seed is not None and (asked.kept is None or asked.kept.paged)
    chance = params.temperature > 0 and not seeded
    begun = any(one.tokens for one in found)
    if chance or not begun or world.draw.random() > world.share:
        return
    world.done["answers checked"] += len(found)
    wanted = world.oracle.answers(asked.kept, asked.prompts, params)
    for one, other in zip(found, wanted, strict=True):
        whole = one.finish != "cancelled"
        tokens = other.tokens if whole else other.tokens[: len(one.tokens)]
        told = f"{asked.name!r} with {params}: {one}, and alone {other}"
        law(one.tokens == tokens, world, told)
        law(not whole or (one.text, one.finish) == (other.text, other.finish), world, told)
        if whole and one.logprobs is not None and other.logprobs is not None:
            pair = torch.tensor(one.logprobs), torch.tensor(other.logprobs)
            law(torch.allclose(*pair, atol=1e-4), world, told)


# -- when nobody is served ----------------------------------------------------------------------------


def rest(world: World) -> None:
    """Let all that was asked come to its end, and look at everything."""
    _end(world)
    law(not world.works and not world.waiting, world, "something that was asked never came")
    _nothing_taken(world)
    _base_is_untouched(world)
    for charge in world.charges.values():
        _trained_as_alone(world, charge)
    _nothing_kept(world)


def _end(world: World) -> None:
    for asked in [asked for asked in world.waiting if asked.stream is not None]:
        finish(world, asked)
    for _ in range(PATIENCE):
        if not world.turn():
            break
        settle(world)
    settle(world)


def finish(world: World, asked: Asked) -> None:
    """Read a stream to its end."""
    stream = asked.stream
    assert stream is not None
    asked.stream = None
    world.waiting.remove(asked)
    try:
        asked.pieces.extend(stream)
    except Exception as error:
        world.errors[type(error).__name__] += 1
        sick = asked.kept is not None and asked.kept.sick and isinstance(error, AnswerError)
        excused = sick or isinstance(error, tuple(asked.excuses))
        law(excused, world, f"a stream of {asked.name!r}: {error!r}")
        return
    law("".join(asked.pieces) == stream.completion.text, world, "pieces that are not the text")
    check(world, asked, [stream.completion])


def leave_stream(world: World, asked: Asked) -> None:
    """Read a stream no further; what came is the beginning of the answer."""
    stream = asked.stream
    assert stream is not None
    asked.stream = None
    world.waiting.remove(asked)
    with stream:
        pass
    found = stream.completion
    law(found.text.startswith("".join(asked.pieces)), world, "pieces that are not the text")
    if found.finish == "length" and len(found.tokens) < asked.params.max_tokens:
        check(world, asked, [replace(found, finish="cancelled")])


def _nothing_taken(world: World) -> None:
    loop, ledger = world.loop, world.loop.ledger
    law(not loop.busy and not world.desk.busy, world, "somebody is served")
    law(ledger.read == 0 and ledger.room == ledger.pages, world, f"{ledger.read} pages are read")
    free = [*ledger.take(ledger.room)]
    law(sorted(free) == list(range(ledger.pages)), world, "a page is free twice, or never")
    ledger.release(free)
    stacked = None if world.bank is None else world.bank.stacked
    law(stacked is None, world, "an adapter lies in a slot")
    for name in list(world.shelf):
        world.tiers.lower(name)  # raises where somebody holds it
    law(world.tiers.active_bytes == 0, world, f"{world.tiers.active_bytes} bytes act")


@torch.no_grad()
def _base_is_untouched(world: World) -> None:
    own = world.untouched.state_dict()
    now = world.model.state_dict()
    law(all(torch.equal(now[key], value) for key, value in own.items()), world, "the base changed")
    wanted = world.untouched(IDS).logits
    if world.bank is None:
        names = [name for name, _ in world.model.named_modules()]
        law(names == world.bare, world, "the bare model has other modules")
    else:
        with tt.using(world.model, None):
            law(torch.equal(world.model(IDS).logits, wanted), world, "the base says otherwise")
        for name in world.attached():
            tt.disable(world.model, name)
    law(torch.equal(world.model(IDS).logits, wanted), world, "disabled, adapters act")
    for name in world.attached():
        tt.enable(world.model, name)


def _trained_as_alone(world: World, charge: Charge) -> None:
    if charge.twin is None:
        return
    here, alone = (
        engine.tenants.of(bank_of(engine.model).require(charge.name))
        for engine in (world.engine, charge.twin)
    )
    law(here.steps == alone.steps, world, f"{charge.name!r}: {here.steps} of {alone.steps} steps")
    close = abs(here.weight - alone.weight) < 1e-6 * max(1, alone.weight)
    law(close, world, f"{charge.name!r}: weight {here.weight}, and alone {alone.weight}")
    wanted = alone.adapter.tensors
    for key, tensor in here.adapter.tensors.items():
        same = torch.allclose(tensor, wanted[key], equal_nan=True, **ROUNDING)
        far = float((tensor - wanted[key]).detach().abs().max())
        law(same, world, f"{charge.name!r}, {charge.method}, {key}: {far} from its twin's")
        grads = tensor.grad, wanted[key].grad
        law(
            (grads[0] is None) == (grads[1] is None),
            world,
            f"{charge.name!r}, {key}: its twin's gradients",
        )


def _nothing_kept(world: World) -> None:
    gc.collect()
    kinds = (Request, Stream, Waiting, Adapter)
    alive = Counter(kind for thing in gc.get_objects() for kind in kinds if isinstance(thing, kind))
    for kind in (Request, Stream, Waiting):
        law(not alive[kind], world, f"{alive[kind]} of {kind.__name__} are alive")
    twins = sum(charge.twin is not None for charge in world.charges.values())
    wanted = len(world.charges) + twins + len(world.shelf)
    law(alive[Adapter] == wanted, world, f"{alive[Adapter]} adapters are alive, not {wanted}")


def leave(world: World) -> None:
    """Take everybody out; then nothing of them is left in the model."""
    rest(world)
    for name in list(world.charges):
        retire(world, name)
    for name in list(world.shelf):
        world.tiers.forget(name)
    world.shelf.clear()
    world.folders.clear()
    world.torn.clear()
    law(world.bank is None, world, "a bank is left in the bare model")
    rest(world)
    held = _held()
    law(held < LEFT, world, f"tensors of {held:,} bytes are alive, and nobody is there")


def _held() -> int:
    """Bytes of all tensors that were made since the world began."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    each = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(each.values())


def retire(world: World, name: str) -> None:
    """Take a tenant out, now."""
    charge = world.charges.pop(name)
    world.excuse(name, *GONE)
    if charge.adopted:
        world.yard.forget(name)
    else:
        tt.detach(world.model, name)
        world.engine.forget(name)
    if charge.twin is not None:
        tt.detach(charge.twin.model, name)
        charge.twin.forget(name)
