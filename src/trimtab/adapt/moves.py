"""Adapters on their way between tiers: who is read, comes up, makes room and goes down.

What was held least recently makes room, a tier down; what is held never does. What is up keeps its place in host
memory, so that it can always come down. One adapter's broken folder is its own error and nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Literal, final

from pydantic import Field

from trimtab.adapt.active import Active, Hold, Waiting
from trimtab.adapt.fit import Forms
from trimtab.adapt.packed import Packed
from trimtab.adapt.shelf import Entry, Shelf
from trimtab.adapt.sources import Read, Source
from trimtab.config import Config
from trimtab.errors import ConfigError

READERS = 4
"""Folders that are read at a time, so that one on a slow disk is waited for by those alone who need it."""
Tier = Literal["active", "host", "disk"]
Home = Callable[[str, Packed], Source]
"""A new folder for an adapter of that name which has none, or is newer than it."""


class Budgets(Config):
    """The most bytes that adapters' tensors take in each tier."""

    active: int = Field(default=1 << 30, gt=0)
    """Of those that act by being attached. What training adds to one counts from when it comes down."""
    host: int = Field(default=4 << 30, gt=0)
    """Of those in host memory, with the places of those that are attached."""
    slots: int = Field(default=1 << 30, gt=0)
    """Of the copies from which answers are made, where adapters can lie in slots (`trimtab.adapt.stack`)."""


@final
class Moves:
    """See the module. The arguments are those of `trimtab.adapt.tiers.Tiers`."""

    def __init__(self, forms: Forms, place: Active, budgets: Budgets, home: Home | None) -> None:
        self._forms = forms
        self._place = place
        self._budgets = budgets
        self._home = home
        self._up = Shelf(budgets.active, lambda entry: entry.acting)
        self._host = Shelf(budgets.host, lambda entry: entry.nbytes)
        """Those in host memory that do not act; but the bytes are of those that do, too, and of those being read."""
        self._reading: dict[Future[Read], Entry] = {}
        self._reader = ThreadPoolExecutor(READERS, thread_name_prefix="trimtab-adapters")

    @property
    def active_bytes(self) -> int:
        return self._up.taken

    @property
    def host_bytes(self) -> int:
        return self._host.taken

    @property
    def reading(self) -> bool:
        """Whether an adapter is being read."""
        return bool(self._reading)

    def tier(self, entry: Entry) -> Tier:
        return "active" if entry in self._up else "disk" if entry.packed is None else "host"

    def acts(self, name: str) -> bool:
        """Whether one of that name is up; it may be one that is forgotten, and held."""
        return bool(self._up.named(name))

    # -- in and out ----------------------------------------------------------------------------------

    def take(self, entry: Entry, packed: Packed) -> None:
        """Let a new one lie in host memory. Raises `ConfigError` where there is no room."""
        if not self._host_room(entry.nbytes):
            raise _no_room(entry)
        entry.packed = packed
        self._host.add(entry)
        self._host.taken += entry.nbytes

    def adopt(self, entry: Entry) -> None:
        """Take up a new one that acts already. Raises `ConfigError` where there is no room."""
        if not (self._active_room(entry.acting) and self._host_room(entry.nbytes)):
            raise _no_room(entry)
        self._up.add(entry)
        self._host.taken += entry.nbytes
        self._up.taken += entry.acting

    def leave(self, entry: Entry) -> None:
        """Keep nothing of one that nobody needs; of any other, as long as somebody does."""
        if entry.needed:
            return
        if entry in self._up:
            self._place.down(entry.name)
            self._up.remove(entry)
            self._up.taken -= entry.acting
            self._host.taken -= entry.nbytes
        elif entry.packed is not None or entry.reading is not None:
            self._host.remove(entry)
            self._host.taken -= entry.nbytes
        if entry.reading is not None:
            del self._reading[entry.reading]
        if not self._up.named(entry.name):
            self._place.forget(entry.name)

    def check_size(self, entry: Entry) -> None:
        """Raise `ConfigError` for what is larger than a tier."""
        if entry.nbytes > self._budgets.host or entry.acting > self._budgets.active:
            raise ConfigError(
                f"adapter {entry.name!r} takes {entry.acting:,} bytes where it acts and {entry.nbytes:,} in host "
                f"memory, where all may take {self._budgets.active:,} and {self._budgets.host:,}; give them more."
            )

    # -- up ------------------------------------------------------------------------------------------

    def hold(self, entry: Entry) -> Hold | Waiting:
        """Have an adapter act, and keep it so; or why that takes longer."""
        self._look(entry)
        if entry not in self._up and (waiting := self._raise(entry)) is not None:
            return waiting
        entry.holds += 1
        self._up.touch(entry)
        return Hold(entry.name, lambda: self._released(entry))

    def plain(self, entry: Entry) -> bool:
        """Whether a copy of its values acts as it does."""
        return entry not in self._up and self._place.plain(entry.name)

    def read(self, entry: Entry) -> Waiting | None:
        """Have one that is down lie in host memory; or why that takes longer."""
        self._look(entry)
        self.check_size(entry)
        if entry.packed is None:
            return self._read(entry)
        self._host.touch(entry)
        return None

    def settle(self) -> list[str]:
        """Take in what was read by now; whose reading ended, well or badly."""
        done = [future for future in self._reading if future.done()]
        return [self._take_in(future) for future in done]

    def wait(self, seconds: float | None) -> list[str]:
        """Wait until one that is being read is there; then as `settle`."""
        if self._reading:
            wait_for(list(self._reading), seconds, FIRST_COMPLETED)
        return self.settle()

    def close(self) -> None:
        """Read no more."""
        self._reader.shutdown(cancel_futures=True)

    def _look(self, entry: Entry) -> None:
        """Take in what was read; raise what was wrong with this one."""
        self.settle()
        if entry.error is not None:
            error, entry.error = entry.error, None
            raise error

    def _raise(self, entry: Entry) -> Waiting | None:
        self.check_size(entry)  # training makes it larger
        if entry.packed is None:
            return self._read(entry)
        if not self._name_free(entry):
            return Waiting.NAMED
        self._host.remove(entry)  # it is not to be sent away for those that make room for it
        try:
            if not self._active_room(entry.acting):
                return Waiting.FULL
            self._place.up(entry.name, entry.packed)
            self._up.add(entry)
        finally:
            if entry not in self._up:
                self._host.add(entry)
        self._up.taken += entry.acting
        if entry.packed.along is not None:  # it goes on up there
            entry.packed = None
            entry.changed()
        return None

    def _name_free(self, entry: Entry) -> bool:
        """Whether no other one of its name is up, once one that nobody holds has come down."""
        for other in self._up.named(entry.name):
            if other.holds:
                return False
            self.down(other)
        return True

    def _read(self, entry: Entry) -> Waiting:
        if entry.reading is not None:
            return Waiting.READING
        if not self._host_room(entry.nbytes):
            return Waiting.FULL
        assert entry.source is not None
        entry.reading = self._reader.submit(entry.source.read)
        self._reading[entry.reading] = entry
        self._host.taken += entry.nbytes
        return Waiting.READING

    def _take_in(self, future: Future[Read]) -> str:
        entry = self._reading.pop(future)
        entry.reading = None
        self._host.taken -= entry.nbytes
        try:
            packed = future.result()(self._forms)
        except Exception as error:  # it is raised where somebody asks for this adapter
            entry.error = error
        else:
            entry.keep(packed, self._place.cost(packed))
            self._host.add(entry)
            self._host.taken += entry.nbytes
        return entry.name

    def _released(self, entry: Entry) -> None:
        entry.holds -= 1
        self._up.touch(entry)
        self.leave(entry)

    # -- down ----------------------------------------------------------------------------------------

    def down(self, entry: Entry) -> None:
        """Let one that is up lie in host memory."""
        changed = self._place.down(entry.name)
        self._up.remove(entry)
        self._up.taken -= entry.acting
        self._host.add(entry)
        if changed is not None:
            self._host.taken -= entry.nbytes
            entry.keep(changed, self._place.cost(changed))
            entry.changed()
            self._host.taken += entry.nbytes
            self._host_room(0)

    def to_disk(self, entry: Entry) -> None:
        """Let one that lies in host memory lie on disk alone."""
        assert entry.packed is not None
        if entry.stale:
            assert self._home is not None
            source = self._home(entry.name, entry.packed)
            source.write(entry.name, entry.packed)
            entry.source, entry.stale = source, False
        entry.packed = None
        self._host.remove(entry)
        self._host.taken -= entry.nbytes

    def may_leave(self, entry: Entry) -> bool:
        """Whether one in host memory has a folder to go to."""
        return not entry.stale or (self._home is not None and entry.known)

    def _active_room(self, nbytes: int) -> bool:
        """Whether so many bytes are free where adapters act, once those used least recently have come down."""
        for entry in self._up.leaving(nbytes, lambda entry: not entry.holds):
            self.down(entry)
        return self._up.taken + nbytes <= self._up.budget

    def _host_room(self, nbytes: int) -> bool:
        """Whether so many bytes are free in host memory, once those used least recently have left it."""
        for entry in self._host.leaving(nbytes, self.may_leave):
            self.to_disk(entry)
        return self._host.taken + nbytes <= self._host.budget


def _no_room(entry: Entry) -> ConfigError:
    return ConfigError(
        f"there is no room for adapter {entry.name!r}: all that could make way is held, or has no folder to go to. "
        "Release some, or give the tiers more bytes."
    )
