"""What names of adapters mean to those who ask: one that is attached to the model, or one of its registry.

One that the registry attached is found in the registry alone, and so by nobody once it is forgotten.
"""

from __future__ import annotations

from functools import cached_property
from typing import final

from transformers import PreTrainedModel

from trimtab.adapt.adapter import Adapter, SiteSpec, whole
from trimtab.adapt.bank import bank_of, find_bank
from trimtab.adapt.contract import Method
from trimtab.adapt.tiers import Tiers
from trimtab.engine.serve.actors import Actor, Attached, Nobody, Registered
from trimtab.engine.serve.fits import adapter_fits, has_windows
from trimtab.engine.serve.seats import Seats
from trimtab.errors import UnknownNameError, suggest


@final
class Adapters:
    """Those of one model, attached or registered. Where a name is both, the registry's is meant."""

    def __init__(self, model: PreTrainedModel, tiers: Tiers) -> None:
        self.tiers = tiers
        self._model = model

    @cached_property
    def _windows(self) -> bool:
        return has_windows(self._model)

    def check(self, name: str) -> None:
        """Raise `UnknownNameError` for a name that no adapter has."""
        if name not in self.tiers and name not in (attached := self._attached):
            known = [*self.tiers, *attached]
            hint = suggest(name, known) or f" There are {len(known):,} others."
            raise UnknownNameError(f"no adapter {name!r} is attached or registered.{hint}")

    def methods(self, name: str | None) -> tuple[Method, ...]:
        """What an adapter does; nothing, for the bare base."""
        return () if name is None else self._said(name)[0]

    def in_pages(self, name: str | None) -> bool:
        """Whether answers of that adapter, or of the bare base, come from pages where the base's do."""
        if name is None:
            return True
        bank = find_bank(self._model)
        methods, sites = self._said(name)
        dropped = bank is not None and bank.dropped.get(name, 0)
        if dropped and any(m.virtual_tokens or m.prompt_tokens for m in methods):
            return False
        return adapter_fits(self._model, methods, sites, windows=self._windows)

    def actor(self, name: str | None, seats: Seats) -> Actor:
        """Who is to act on one request. Raises as `check`."""
        if name is None:
            return Nobody()
        self.check(name)
        if name in self.tiers:
            return Registered(self._model, seats, self.tiers, name, self.methods(name))
        return Attached(self._model, seats, self._attached[name])

    @property
    def _attached(self) -> dict[str, Adapter]:
        bank = find_bank(self._model)
        own = {} if bank is None else bank.adapters
        return {name: adapter for name, adapter in own.items() if not self.tiers.acts(name)}

    def _said(self, name: str) -> tuple[tuple[Method, ...], tuple[SiteSpec, ...]]:
        """The methods of an adapter, and its sites."""
        form = self.tiers.form(name) if name in self.tiers else None
        if form is not None:
            return whole(form.method), form.sites
        adapter = bank_of(self._model).require(name)
        return adapter.methods, adapter.sites
