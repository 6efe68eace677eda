"""Which adapters lie in slots while they answer (`trimtab.adapt.stack`), at which version, and for how many requests.

All slots are given here. A seat is a copy of an adapter's values. So an adapter may learn while it answers, leave host
memory, or lose its name: requests that have begun go on with the values that they began with, and new ones get new
ones. A seat that nobody has is kept for the next request until its room is needed, or nobody at all is served.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from itertools import count

from trimtab.adapt.active import Waiting
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.stack import Factors, Stack
from trimtab.errors import TrimtabError
from trimtab.frozen import stamp

NONE = -1
"""The seat of those that act by their names."""


class Versions:
    """What tells adapters, and states of one, apart. Unlike an address, a number is never given twice."""

    def __init__(self) -> None:
        self._numbers = count()
        self._known: dict[int, tuple[weakref.ref[Adapter], int]] = {}

    def of(self, adapter: Adapter) -> Hashable:
        """Differs once the adapter is another one, or its values may have changed."""
        known = self._known.get(id(adapter))
        if known is None or known[0]() is not adapter:
            self._known = {key: pair for key, pair in self._known.items() if pair[0]() is not None}
            known = self._known[id(adapter)] = weakref.ref(adapter), next(self._numbers)
        return known[1], stamp(adapter.named().values())


class Seats:
    """The seats of one model; ``stack`` is None where adapters cannot lie in slots."""

    def __init__(self, stack: Stack | None) -> None:
        self.versions = Versions()
        self._stack = stack
        self._of: dict[Hashable, int] = {}
        """Version of an adapter -> its slot, the one used longest ago first."""
        self._users: dict[int, int] = {}
        self._lacking: Hashable = None
        """The version for which there was no room."""
        self._freed = False
        """Whether there may be some since."""

    def __contains__(self, version: Hashable) -> bool:
        return version in self._of

    def sit(self, adapter: Adapter, version: Hashable) -> int:
        """A slot with these values for one more user that could act by name as well; `NONE` where there is none, or
        where somebody who cannot waits for one."""
        found = NONE if self._lacking is not None else self._seat(lambda: adapter, version)
        return NONE if found is None else found

    def take(self, adapter: Callable[[], Adapter], version: Hashable) -> int | Waiting:
        """A slot with these values for one more user; `NONE` where there never is one for them."""
        if version == self._lacking and not self._freed:
            return Waiting.FULL
        self._freed = False
        found = self._seat(adapter, version)
        self._lacking = version if found is None else None
        return Waiting.FULL if found is None else found

    def nobody_waits(self) -> None:
        """Whoever could not be given a slot wants none any more."""
        self._lacking = None

    def rise(self, slot: int) -> None:
        """One user less."""
        if slot != NONE:
            self._users[slot] -= 1
            self._freed = self._freed or not self._users[slot]

    def clear(self) -> None:
        """Give back the seats that nobody has."""
        while self._drop_one():
            pass

    def _seat(self, adapter: Callable[[], Adapter], version: Hashable) -> int | None:
        """One more user's slot; `NONE` where there can be none, None where there is none now."""
        slot = self._of.pop(version, None)
        if slot is None:
            slot = self._new(adapter)
            if slot is None or slot == NONE:
                return slot
        self._of[version] = slot
        self._users[slot] = self._users.get(slot, 0) + 1
        return slot

    def _new(self, adapter: Callable[[], Adapter]) -> int | None:
        if self._stack is None:
            return NONE
        with suppress(TrimtabError):
            factors = self._stack.read(adapter())
            if self._stack.could(factors):
                return self._stack.lay(factors) if self._room(self._stack, factors) else None
        return NONE

    def _room(self, stack: Stack, factors: Factors) -> bool:
        """Whether there is room, once those that nobody has have made way, the one used longest ago first."""
        while not (fits := stack.room(factors)) and self._drop_one():
            pass
        return fits

    def _drop_one(self) -> bool:
        """Drop the free seat used longest ago, if there is one."""
        for version, slot in self._of.items():
            if not self._users[slot]:
                assert self._stack is not None
                del self._of[version], self._users[slot]
                self._stack.drop(slot)
                return True
        return False
