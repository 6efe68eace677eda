"""Who acts on the text of a request, from when on and until when: nobody, an attached adapter, or a registered one.

An attached adapter acts with the values that it has when it is asked for. A registered one that waits in host memory or
on disk (`trimtab.adapt.tiers`) is claimed then, and acts when there is room: from a slot, where a copy of its values
can lie in one, and else by being attached. What was asked for stays that adapter, whatever its name means later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import final

from transformers import PreTrainedModel

from trimtab.adapt.active import Hold, Waiting
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import bank_of
from trimtab.adapt.claim import Claim
from trimtab.adapt.contract import Method
from trimtab.adapt.tiers import Tiers
from trimtab.engine.serve.seats import NONE, Seats


class Actor(ABC):
    """Who acts on one request. Abstract."""

    def __init__(self, name: str, methods: Sequence[Method]) -> None:
        self.name = name
        """Empty for the bare base."""
        self.there = False
        """Whether it can act now."""
        self.slot = NONE
        """Where its values lie; `NONE` where it acts by its name."""
        self.version: Hashable = ()
        """What keys and values depend on beside tokens, once it is there."""
        self.lead = sum(method.virtual_tokens + method.prompt_tokens for method in methods)
        """The virtual tokens before a text."""
        self.remembers = any(method.remembers for method in methods)
        """Whether it decides something at a prompt; nothing that it reads is then of use to another request."""

    @abstractmethod
    def ask(self) -> None:
        """It is asked for: who acts is settled, and where it is there, with which values."""

    @abstractmethod
    def come(self) -> Waiting | None:
        """Be there; or why that takes longer. Raises what is wrong with the adapter."""

    @abstractmethod
    def leave(self) -> None:
        """It is needed no more."""

    @abstractmethod
    def gone(self, attached: Mapping[str, Adapter]) -> bool:
        """Whether it was there and is not any more, where these are attached."""


@final
class Nobody(Actor):
    """The bare base answers."""

    def __init__(self) -> None:
        super().__init__("", ())
        self.there = True

    def ask(self) -> None:
        pass

    def come(self) -> Waiting | None:
        return None

    def leave(self) -> None:
        pass

    def gone(self, attached: Mapping[str, Adapter]) -> bool:
        return False


@final
class Attached(Actor):
    """An adapter that somebody attached; with its values in a slot where they can lie in one."""

    def __init__(self, model: PreTrainedModel, seats: Seats, adapter: Adapter) -> None:
        super().__init__(adapter.name, adapter.methods)
        self._model = model
        self._seats = seats
        self._adapter = adapter

    def ask(self) -> None:
        self.there = True
        if self.remembers:
            return
        bank = bank_of(self._model)
        acts = bank.scales.get(self.name, 1.0), bank.dropped.get(self.name, 0)
        self.version = self._seats.versions.of(self._adapter), acts
        self.slot = self._seats.sit(self._adapter, self.version)

    def come(self) -> Waiting | None:
        return None

    def leave(self) -> None:
        self._seats.rise(self.slot)

    def gone(self, attached: Mapping[str, Adapter]) -> bool:
        return attached.get(self.name) is not self._adapter


@final
class Registered(Actor):
    """An adapter of the registry."""

    def __init__(
        self, model: PreTrainedModel, seats: Seats, tiers: Tiers, name: str, methods: Sequence[Method]
    ) -> None:  # fmt: skip
        super().__init__(name, methods)
        self._model = model
        self._seats = seats
        self._tiers = tiers
        self._claim: Claim | None = None
        self._hold: Hold | None = None
        self._attached: Attached | None = None

    def ask(self) -> None:
        self._claim = self._tiers.claim(self.name)
        if not self._claim.up:
            return
        try:
            self.come()  # somebody may be about to change it
        except BaseException:
            self._claim.release()
            raise

    def come(self) -> Waiting | None:
        claim = self._claim
        if self.there or claim is None:
            return None
        if claim.plain and not self.remembers:
            waiting = self._sit(claim)
            if waiting is not None or self.there:
                return waiting
        found = claim.hold()
        if isinstance(found, Waiting):
            return found
        self._act(found)
        return None

    def leave(self) -> None:
        if self._attached is not None:
            self._attached.leave()
        else:
            self._seats.rise(self.slot)
        if self._hold is not None:
            self._hold.release()
        if self._claim is not None:
            self._claim.release()

    def gone(self, attached: Mapping[str, Adapter]) -> bool:
        by_name = self._attached if self._hold is not None else None
        return by_name is not None and by_name.gone(attached)

    def _sit(self, claim: Claim) -> Waiting | None:
        """Act from a slot, if it can."""
        version = "registered", claim.version
        if version not in self._seats and (waiting := claim.read()) is not None:
            return waiting
        slot = self._seats.take(claim.adapter, version)
        if isinstance(slot, Waiting):
            return slot
        self.slot, self.version, self.there = slot, version, slot != NONE
        return None

    def _act(self, hold: Hold) -> None:
        """Act as one that is attached, which it is; with its values in a slot it need not stay so."""
        try:
            attached = Attached(self._model, self._seats, bank_of(self._model).require(self.name))
            attached.ask()
        except BaseException:
            hold.release()
            raise
        self._attached = attached
        self.slot, self.version, self.there = attached.slot, attached.version, True
        if self.slot == NONE:
            self._hold = hold
        else:
            hold.release()
