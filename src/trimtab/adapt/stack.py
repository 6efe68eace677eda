"""Adapters in slots: many low-rank adapters act in one batch by one operation at each place.

An adapter is put in by value: it need not be attached, and its factors lie beside others' (`trimtab.adapt.pool`).
A route then names a slot for each unit in place of an owner; units without one go on by their owners, in the same
batch. Only what adds a product of two factors at linear layers can lie in a slot: the method says (`Method.stacks`).

A slot's number is that of its pool and of its place there, pool · 2²⁰ + place: rows in the order of their slots are in
the order of their pools. It stays the same until the slot is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from trimtab.adapt import fusing
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import existing_bank, new_bank, strip
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import At, Method, Params
from trimtab.adapt.edit import Edit
from trimtab.adapt.plan import layer_at
from trimtab.adapt.pool import Form, Pool, Share, form_of
from trimtab.adapt.route import SLOTS
from trimtab.adapt.site import LayerSite
from trimtab.adapt.stackable import Stackable
from trimtab.adapt.tree import Children, anatomy_of, sites_of
from trimtab.adapt.wrapping import Wrapping
from trimtab.errors import AttachError, RouteError, TrimtabError, UnsupportedError
from trimtab.kernels.lowrank import Change
from trimtab.kernels.stacked import Rows
from trimtab.kernels.tracing import traced

SPAN = 1 << 20
"""Slots that a pool can have."""
BUDGET = 1 << 30
"""Bytes that slots may take, where nobody says otherwise."""


class Factors(NamedTuple):
    """What an adapter adds at its places, by path; and the form that this has."""

    name: str
    form: Form
    changes: Mapping[str, Change]


class Stack:
    """The adapters of one model that lie in slots, in at most ``budget`` bytes. The model's own is `Stack.of`.

    With the first adapter the places where it acts are wrapped, as attaching does; with the last one that is dropped,
    the model is as it was.

    Raises:
        UnsupportedError: parts of the model are called once for each adapter.
    """

    def __init__(self, model: nn.Module, budget: int = BUDGET) -> None:
        self._model = model
        self._anatomy = anatomy_of(model)
        if self._anatomy.apart:
            raise UnsupportedError(
                f"{type(model).__name__} calls some of its modules once for each adapter of a batch, so adapters "
                "cannot act from slots in it; attach them."
            )
        self._reader = Stackable(model, self._anatomy)
        self._pools: dict[int, Pool] = {}
        self.budget = budget

    @classmethod
    def of(cls, model: nn.Module, budget: int = BUDGET) -> Stack:
        """That of a model: the one that holds adapters now, or a new one of that budget."""
        bank = existing_bank(model)
        return cls(model, budget) if bank is None or bank.stacked is None else bank.stacked

    @property
    def slots(self) -> list[int]:
        """The slots in which adapters lie."""
        return [n * SPAN + place for n, pool in self._pools.items() for place in sorted(pool.taken)]

    @property
    def nbytes(self) -> int:
        """What slots take, the free ones among them."""
        return sum(pool.nbytes for pool in self._pools.values())

    # -- in and out ------------------------------------------------------------------------------------

    def takes(self, adapter: Adapter) -> bool:
        """Whether `put` would succeed."""
        with suppress(TrimtabError):
            return self.room(self.read(adapter))
        return False

    def read(self, adapter: Adapter) -> Factors:
        """What an adapter would have in a slot: its own tensors, as they are now.

        One that is attached acts there as it does here now: scaled (`trimtab.scale`), or without its first blocks.

        Raises:
            UnsupportedError: it does more than to add a product of two factors at linear layers.
            AttachError: its base is another, or it does not fit this one.
        """
        changes = self._reader.changes(adapter)
        return Factors(adapter.name, form_of(changes), changes)

    def could(self, factors: Factors) -> bool:
        """Whether there would be room if nothing lay here."""
        known = self._number(factors.form) in self._pools
        return known or self._made(factors.form).slot_bytes <= self.budget

    def room(self, factors: Factors) -> bool:
        """Whether there is room now."""
        pool = self._pools.get(self._number(factors.form)) or self._made(factors.form)
        return len(pool.taken) < pool.capacity or self._growth(pool) > 0

    def put(self, adapter: Adapter) -> int:
        """Copy an adapter's values into a free slot, and say which.

        Raises:
            UnsupportedError, AttachError: as `read` says, or there is no room. Nothing was changed.
        """
        return self.lay(self.read(adapter))

    def lay(self, factors: Factors) -> int:
        """As `put`, of what was read."""
        if not self.room(factors):
            raise AttachError(
                f"adapter {factors.name!r} does not fit: slots take {self.nbytes:,} of {self.budget:,} bytes. Drop "
                "one, or raise the stack's budget."
            )
        number = self._number(factors.form)
        pool = self._pools.get(number) or self._open(number, factors.form)
        place = pool.free()
        if place is None:
            pool.grow(pool.capacity + self._growth(pool))
            place = pool.free()
        assert place is not None
        pool.write(place, factors.changes)
        return number * SPAN + place

    def replace(self, slot: int, adapter: Adapter) -> None:
        """Copy another adapter's values, or newer ones of the same, into a slot that is taken.

        Raises:
            AttachError: its places or ranks are of another form.
        """
        pool, place = self._at(slot)
        changes = self._reader.changes(adapter)
        if form_of(changes) != pool.form:
            raise AttachError(
                f"adapter {adapter.name!r} has other places or ranks than slot {slot} has room for; put it into one of "
                "its own."
            )
        pool.write(place, changes)

    def drop(self, slot: int) -> None:
        """Let a slot be free. All others stay where they are."""
        pool, place = self._at(slot)
        pool.taken.discard(place)
        if not pool.taken:
            self._close(slot // SPAN)

    def _at(self, slot: int) -> tuple[Pool, int]:
        number, place = divmod(slot, SPAN)
        if number not in self._pools or place not in self._pools[number].taken:
            raise RouteError(f"no adapter lies in slot {slot}; put one there first.")
        return self._pools[number], place

    # -- room ------------------------------------------------------------------------------------------

    def _number(self, form: Form) -> int:
        """The number of the pool of a form, or the one that it would have."""
        for number, pool in self._pools.items():
            if pool.form == form:
                return number
        return next(n for n in range(len(self._pools) + 1) if n not in self._pools)

    def _growth(self, pool: Pool) -> int:
        """By how many slots a pool can grow."""
        return pool.growth(self.budget - self.nbytes) - pool.capacity

    def _made(self, form: Form) -> Pool:
        return Pool(form, {path: layer_at(self._anatomy, path) for path, _ in form})

    # -- the model -------------------------------------------------------------------------------------

    def _open(self, number: int, form: Form) -> Pool:
        """A new pool, with edits at its places."""
        model = self._model
        bank = existing_bank(model)
        if bank is not None and bank.stacked not in (None, self):
            raise AttachError(
                "this model has another stack that holds adapters; use Stack.of(model)."
            )
        pool, bank = self._made(form), bank or new_bank(model)
        bank.stacked, self._pools[number] = self, pool
        try:
            tree = Wrapping(model, bank, self._anatomy)
            for path, _ in form:
                site = tree.site(path)
                if not isinstance(site, LayerSite):
                    raise UnsupportedError(f"{path!r} is wrapped as a whole; slots act at layers.")
                if SLOTS not in site.edits:
                    site.add(_StackEdit(path, self))
            fusing.arrange(tree.sites)
            pool.grow(self._growth(pool))
        except BaseException:
            self._close(number)
            raise
        return pool

    def _close(self, number: int) -> None:
        """Take a pool out, and what no other one needs."""
        del self._pools[number]
        model = self._model
        children = Children(model)
        for path, site in sites_of(model).items():
            if SLOTS in site.edits and not any(path in pool for pool in self._pools.values()):
                site.withdraw(SLOTS)
                if site.bare():
                    children.replace(site, site.release())
        fusing.arrange(sites_of(model))
        if not self._pools:
            bank = bank_of(model)
            bank.stacked = None
            if not bank.adapters:
                strip(model, bank)

    # -- at each forward -------------------------------------------------------------------------------

    def output(self, site: LayerSite, x: Tensor) -> Tensor | None:
        """What comes out of a layer where all rows lie in slots of one pool, which an earlier layer has found; None
        where it is not so simple. As `LayerSite.forward`, without what is the same each time."""
        context = site.bank.context(site.training)
        slots = context.route.slots
        if slots is None or torch.is_grad_enabled() or traced() or SLOTS not in site.edits:
            return None
        shares = context.stacked.get(x.shape[:-1])
        if not shares or shares[0].index is not None or min(slots) < 0:
            return None
        share: Share = shares[0]
        with site.room():
            y: Tensor = site.frozen(x)
        if site.path not in share.pool:
            return y
        added = share.pool.delta(site.path, x, share, context.scratch)
        return y + added.view(y.shape).to(y.dtype)

    def shares(self, x: Tensor, at: At) -> list[Share]:
        """Which rows of x_..I, in the order of its leading axes, lie in which pool; found once for each shape."""
        found: list[Share] | None = at.context.stacked.get(x.shape[:-1])
        if found is None:
            found = at.context.stacked[x.shape[:-1]] = self._shares(x, at)
        return found

    def _shares(self, x: Tensor, at: At) -> list[Share]:
        given = at.context.route.slots
        assert given is not None
        for slot in set(given):
            if slot >= 0:
                self._at(slot)
        slots = torch.tensor(given)
        if at.part.units is not None:
            slots = slots[at.part.units.cpu()]
        slots_N = slots.repeat_interleave(x.shape[:-1].numel() // len(slots))
        numbers = slots_N.div(SPAN, rounding_mode="floor")
        shares = []
        for number in numbers.unique().tolist():
            here = (numbers == number).nonzero().flatten()
            rows = Rows((slots_N[here] % SPAN).tolist(), x.device)
            everywhere = len(here) == len(slots_N)
            shares.append(
                Share(self._pools[number], None if everywhere else here.to(x.device), rows)
            )
        return shares


class _StackEdit(Edit):
    """What slots do at one place."""

    def __init__(self, path: str, stack: Stack) -> None:
        super().__init__(
            adapter=SLOTS, method=_Stacked(), path=path, role="", block=None, blocks=0, order=(0, 1),
            causal=False, answers=False, specs={}, shared={},
        )  # fmt: skip
        self.stack = stack

    def delta(self, x: Tensor, at: At) -> Tensor | None:
        """What each row's slot adds; None where none of them has this place."""
        shares = [share for share in self.stack.shares(x, at) if self.path in share.pool]
        total = None
        for share in shares:
            added = share.pool.delta(self.path, x, share, at.context.scratch)
            if share.index is None:
                return added.view(*x.shape[:-1], -1)
            if total is None:
                total = added.new_zeros(x.shape[:-1].numel(), added.shape[-1])
            total = total.index_copy(0, share.index, added)
        return None if total is None else total.view(*x.shape[:-1], -1)


@final
class _Stacked(Method):
    """The method of whatever lies in slots."""

    kind: ClassVar[str] = "stacked"

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        edit = at.edit
        assert isinstance(edit, _StackEdit)
        return edit.delta(x, at)
