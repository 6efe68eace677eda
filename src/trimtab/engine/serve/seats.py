"""Which adapters lie in slots while they answer (`trimtab.adapt.stack`), at which version, and for how many requests.

A seat is a copy of an adapter's values. So an adapter may learn while it answers: requests that have begun go on with
the values that they began with, and new ones get new ones. A seat that nobody has is kept for the next request until
its room is needed, or nobody at all is served.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from itertools import count

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.stack import Stack
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
        self._stack = stack
        self._of: dict[Hashable, int] = {}
        """Version of an adapter -> its slot, the one used longest ago first."""
        self._users: dict[int, int] = {}

    def sit(self, adapter: Adapter, version: Hashable) -> int:
        """A slot with these values for one more user; `NONE` where there can be none."""
        if self._stack is None:
            return NONE
        slot = self._of.pop(version, None)
        if slot is None:
            while not (fits := self._stack.takes(adapter)) and self._drop_one():
                pass
            if not fits:
                return NONE
            slot = self._stack.put(adapter)
        self._of[version] = slot
        self._users[slot] = self._users.get(slot, 0) + 1
        return slot

    def rise(self, slot: int) -> None:
        """One user less."""
        if slot != NONE:
            self._users[slot] -= 1

    def clear(self) -> None:
        """Give back the seats that nobody has."""
        while self._drop_one():
            pass

    def _drop_one(self) -> bool:
        """Drop the free seat used longest ago, if there is one."""
        for version, slot in self._of.items():
            if not self._users[slot]:
                assert self._stack is not None
                del self._of[version], self._users[slot]
                self._stack.drop(slot)
                return True
        return False
