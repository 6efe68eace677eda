"""One tier of adapters: who is in it, in which order they were used, and who makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count

from trimtab.adapt.packed import Form, Packed
from trimtab.adapt.sources import Read, Source


class Entry:
    """One adapter: what it takes, where it lies, and who needs it."""

    __slots__ = (
        "acting",
        "claims",
        "error",
        "form",
        "holds",
        "known",
        "name",
        "nbytes",
        "packed",
        "reading",
        "source",
        "stale",
        "version",
    )

    def __init__(
        self, name: str, source: Source | None, form: Form | None, nbytes: int, acting: int
    ) -> None:
        self.name = name
        self.source = source
        self.form = form
        """None until it comes down for the first time, of one that acted when it was taken up."""
        self.nbytes = nbytes
        """Bytes of it in host memory."""
        self.acting = acting
        """Bytes of it where it acts."""
        self.packed: Packed | None = None
        self.stale = source is None
        """Whether its folder, if it has one, holds something older."""
        self.version = next(_VERSIONS)
        """Another number once its values may be others; none is given twice."""
        self.holds = 0
        """Who keeps it where it acts."""
        self.claims = 0
        """Who will need it."""
        self.known = True
        """Whether its name is still its own."""
        self.reading: Future[Read] | None = None
        self.error: Exception | None = None

    @property
    def needed(self) -> bool:
        """Whether it is to be found, by its name or by those who have it already."""
        return self.known or self.holds > 0 or self.claims > 0

    def keep(self, packed: Packed, acting: int) -> None:
        """Be this in host memory from now on."""
        self.packed, self.form = packed, packed.form
        self.nbytes, self.acting = packed.nbytes, acting

    def changed(self) -> None:
        """Its values are others by now."""
        self.stale, self.version = True, next(_VERSIONS)


_VERSIONS = count()


class Shelf:
    """A tier of so many bytes. ``size`` says what an adapter takes there."""

    def __init__(self, budget: int, size: Callable[[Entry], int]) -> None:
        self.budget = budget
        self.taken = 0
        self.size = size
        self._entries: OrderedDict[Entry, None] = OrderedDict()

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._entries

    def named(self, name: str) -> list[Entry]:
        """Those of a name; there may be more than one, where the name is another's by now."""
        return [entry for entry in self._entries if entry.name == name]

    def add(self, entry: Entry) -> None:
        """As the one used last."""
        self._entries[entry] = None

    def remove(self, entry: Entry) -> None:
        """It is here no more; nothing, where it was not."""
        self._entries.pop(entry, None)

    def touch(self, entry: Entry) -> None:
        """It is used now."""
        self._entries.move_to_end(entry)

    def leaving(self, nbytes: int, may: Callable[[Entry], bool]) -> list[Entry]:
        """Who of those that may leave makes room for so many bytes more, the one used least recently first; nobody,
        where there is room, or where all of them would not be enough."""
        lacking = self.taken + nbytes - self.budget
        found: list[Entry] = []
        for entry in self._entries if lacking > 0 else ():
            if may(entry):
                found.append(entry)
                lacking -= self.size(entry)
                if lacking <= 0:
                    return found
        return []
