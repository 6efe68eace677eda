"""Adapters in training among the tiers of `trimtab.adapt.tiers`: what training needs goes where the adapter goes.

    active   attached, a tenant of the engine
    host     its masters, and beside them the moments, counts, gradients so far, its generator and its method's memory
    disk     a state folder (`trimtab.engine.state`)

All of it comes back bit for bit, what it draws random numbers from included. What the caller of `Engine.save` added
to a state folder stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from transformers import PreTrainedModel

from trimtab.adapt.active import Active
from trimtab.adapt.attached import Attached
from trimtab.adapt.fit import Forms
from trimtab.adapt.packed import Along, Packed
from trimtab.adapt.sources import AdapterFolder, Read, Source
from trimtab.adapt.tiers import Budgets, Tiers
from trimtab.engine import state
from trimtab.engine.tenant import Tenants
from trimtab.errors import TrimtabError


@final
class Tenancy(Active):
    """The adapters attached to an engine's model: those in training with all that the engine keeps for them."""

    def __init__(self, attached: Attached, tenants: Tenants) -> None:
        self._attached = attached
        self._tenants = tenants
        self._extras: dict[str, Mapping[str, Any]] = {}
        """Of those that are up: what their state folders say for their callers."""

    def up(self, name: str, packed: Packed) -> None:
        self._attached.up(name, packed)
        along = packed.along
        if along is None or not along.names:  # nobody has trained it yet
            return
        adapter = self._attached.adapter(name)
        where = f"what goes along with {name!r}"
        try:
            found = state.assembled(adapter, along.tensors, along.facts, where)
            state.take_up(self._tenants.of(adapter), found)
        except TrimtabError:
            self._tenants.leave(name)
            self._attached.down(name)
            raise
        self._extras[name] = found.extra

    def down(self, name: str) -> Packed | None:
        tenant = self._tenants.leave(name)
        tensors = {} if tenant is None else state.tensors_of(tenant)
        facts = state.NEW if tenant is None else state.facts_of(tenant)
        along = Along.of(tensors, {**facts, "extra": self._extras.pop(name, {})})
        packed = self._attached.down(name)
        return packed if packed is None or packed.along is None else replace(packed, along=along)

    def forget(self, name: str) -> None:
        self._attached.forget(name)

    def has(self, name: str) -> bool:
        return self._attached.has(name)

    def plain(self, name: str) -> bool:
        return self._attached.plain(name)

    def cost(self, packed: Packed) -> int:
        return self._attached.cost(packed)

    def size(self, name: str) -> int:
        adapter = self._attached.adapter(name)
        tenant = self._tenants.known(adapter)
        held = () if tenant is None else state.tensors_of(tenant).values()
        return adapter.nbytes + sum(tensor.nbytes for tensor in held)


@final
class StateFolder(Source):
    """A state folder, from which training goes on."""

    files = (
        state.STATE,
        state.TENSORS,
        *(f"{state.ADAPTER}/{name}" for name in AdapterFolder.files),
    )

    def check(self, forms: Forms) -> Packed:
        self.note()
        adapter, tensors, facts = state.parts(Path(self.folder))
        state.assembled(adapter, tensors, facts, self.folder)
        forms.fit(adapter)
        self.same()
        return forms.whole(adapter, _along(tensors, facts))

    def read(self) -> Read:
        self.same()
        adapter, tensors, facts = state.parts(Path(self.folder))
        return lambda forms: forms.whole(adapter, _along(tensors, facts))

    def write(self, name: str, packed: Packed) -> None:
        assert packed.along is not None
        along = packed.along
        state.put(packed.adapter(name), along.tensors, along.facts, Path(self.folder))
        self.note()


def _along(tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> Along:
    return Along.of(tensors, {key: value for key, value in facts.items() if key != "schema"})


def tiers_of(
    model: PreTrainedModel, tenants: Tenants, budgets: Budgets, folder: str | Path | None
) -> Tiers:
    """The registry of the adapters of an engine (`Engine.tiers`), which serves some and trains others.

    Args:
        budgets: the most bytes of each tier.
        folder: where adapters go that leave host memory and have no folder, or are newer than it; without it they stay.
    """
    forms = Forms(model)

    def home(name: str, packed: Packed) -> Source:
        where = Path(str(folder)) / name
        return AdapterFolder(where) if packed.along is None else StateFolder(where)

    place = Tenancy(Attached(model, forms), tenants)
    return Tiers(forms, place, budgets, None if folder is None else home)
