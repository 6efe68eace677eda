"""Who acts on the text of a request, from when on and until when: nobody, an attached adapter, or a registered one.

An attached adapter acts with the values that it has when it is asked for. A registered one that waits in host memory or
on disk (`trimtab.adapt.tiers`) is claimed then, and acts when there is room: from a slot, where a copy of its values
can lie in one, and else by being attached. What was asked for stays that adapter, whatever its name means later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import final

from transformers import PreTrainedModel

from trimtab.adapt.active import Hold, Waiting
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import Bank, bank_of
from trimtab.adapt.claim import Claim
from trimtab.adapt.contract import Method
from trimtab.adapt.tiers import Tiers
from trimtab.engine.serve.seats import NONE, Seats
from trimtab.errors import AnswerError, TrimtabError, UnknownNameError

Reach = tuple[float, int]
"""How far an adapter goes (`trimtab.scale`), and how many of the first blocks it is left out of."""
FULL: Reach = (1.0, 0)


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
    def lost(self, bank: Bank | None) -> TrimtabError | None:
        """Why it cannot go on as it was there; None where it can, or has not come yet."""


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

    def lost(self, bank: Bank | None) -> TrimtabError | None:
        return None


@final
class Attached(Actor):
    """An adapter that somebody attached; with its values in a slot where they can lie in one."""

    def __init__(self, model: PreTrainedModel, seats: Seats, adapter: Adapter) -> None:
        super().__init__(adapter.name, adapter.methods)
        self._model = model
        self._seats = seats
        self._adapter = adapter
        self._reach = FULL

    def ask(self) -> None:
        self.there = True
        self._reach = _reach(bank_of(self._model), self.name)
        if not self.remembers:
            self.version = self._seats.versions.of(self._adapter), self._reach
            self.slot = self._seats.sit(self._adapter, self.version)

    def come(self) -> Waiting | None:
        return None

    def leave(self) -> None:
        self._seats.rise(self.slot)

    def lost(self, bank: Bank | None) -> TrimtabError | None:
        if bank is None or bank.adapters.get(self.name) is not self._adapter:
            return UnknownNameError(
                f"adapter {self.name!r} was taken out or replaced while it answered."
            )
        if self.slot == NONE and self._reach != _reach(bank, self.name):
            return AnswerError(
                f"adapter {self.name!r} was scaled, or left out of other blocks, while it answered, and an answer is "
                "of one adapter as it is; ask again."
            )
        return None


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

    def lost(self, bank: Bank | None) -> TrimtabError | None:
        by_name = self._attached if self._hold is not None else None
        return None if by_name is None else by_name.lost(bank)

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


def _reach(bank: Bank, name: str) -> Reach:
    return bank.scales.get(name, 1.0), bank.dropped.get(name, 0)
