"""One tier of adapters: who is in it, in which order they were used, and who makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from trimtab.adapt.packed import Packed
from trimtab.adapt.sources import Read, Source


class Entry:
    """One adapter: what it takes, where it lies, and how many hold it."""

    __slots__ = (
        "acting",
        "error",
        "holds",
        "name",
        "nbytes",
        "packed",
        "reading",
        "source",
        "stale",
    )

    def __init__(self, name: str, source: Source | None, nbytes: int, acting: int) -> None:
        self.name = name
        self.source = source
        self.nbytes = nbytes
        """Bytes of it in host memory."""
        self.acting = acting
        """Bytes of it where it acts."""
        self.packed: Packed | None = None
        self.stale = source is None
        """Whether its folder, if it has one, holds something older."""
        self.holds = 0
        self.reading: Future[Read] | None = None
        self.error: Exception | None = None


class Shelf:
    """A tier of so many bytes. ``size`` says what an adapter takes there."""

    def __init__(self, budget: int, size: Callable[[Entry], int]) -> None:
        self.budget = budget
        self.taken = 0
        self.size = size
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __contains__(self, entry: Entry) -> bool:
        return entry.name in self._entries

    def add(self, entry: Entry) -> None:
        """As the one used last."""
        self._entries[entry.name] = entry

    def remove(self, entry: Entry) -> None:
        """It is here no more; nothing, where it was not."""
        self._entries.pop(entry.name, None)

    def touch(self, entry: Entry) -> None:
        """It is used now."""
        self._entries.move_to_end(entry.name)

    def leaving(self, nbytes: int, may: Callable[[Entry], bool]) -> list[Entry]:
        """Who of those that may leave makes room for so many bytes more, the one used least recently first; nobody,
        where there is room, or where all of them would not be enough."""
        lacking = self.taken + nbytes - self.budget
        found: list[Entry] = []
        for entry in self._entries.values() if lacking > 0 else ():
            if may(entry):
                found.append(entry)
                lacking -= self.size(entry)
                if lacking <= 0:
                    return found
        return []
