"""Many adapters of one base in three tiers: a few that act, more in host memory, and all others on disk.

    active   attached, or in slots of a stack: whoever `Active` is
    host     packed (`trimtab.adapt.packed`)
    disk     a folder (`trimtab.adapt.sources`)

Who needs an adapter holds it: `Tiers.hold` brings it up, or says what to wait for. What was held least recently makes
room, a tier down; what is held never does. What is up keeps its place in host memory, so that it can always come down.
One adapter's broken folder is its own error and nobody else's.

Folders are read on a thread of their own, one at a time. All else is for one thread: the one that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Literal, final

from pydantic import Field

from trimtab.adapt.active import Active, Hold, Waiting
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.fit import Forms
from trimtab.adapt.packed import Packed
from trimtab.adapt.shelf import Entry, Shelf
from trimtab.adapt.sources import Read, Source
from trimtab.config import Config
from trimtab.errors import AttachError, ConfigError, DuplicateNameError, UnknownNameError, suggest

Tier = Literal["active", "host", "disk"]


class Budgets(Config):
    """The most bytes that adapters' tensors take in each tier."""

    active: int = Field(gt=0)
    """Of those that act. What training adds to one counts from when it comes down."""
    host: int = Field(gt=0)
    """Of those in host memory, with the places of those that act."""


@final
class Tiers:
    """The registry of the adapters of one base.

    Args:
        forms: of the model that they are for.
        place: where they act.
        budgets: the most bytes of each tier.
        home: a new folder for an adapter of that name which has none, or is newer than it; without it, such adapters
            stay in host memory.
    """

    def __init__(
        self,
        forms: Forms,
        place: Active,
        budgets: Budgets,
        home: Callable[[str, Packed], Source] | None = None,
    ) -> None:
        self._forms = forms
        self._place = place
        self._budgets = budgets
        self._home = home
        self._entries: dict[str, Entry] = {}
        self._up = Shelf(budgets.active, lambda entry: entry.acting)
        self._host = Shelf(budgets.host, lambda entry: entry.nbytes)
        """Those in host memory that do not act; but the bytes are of those that do, too, and of those being read."""
        self._reading: dict[Future[Read], Entry] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="trimtab-adapters")

    @property
    def active_bytes(self) -> int:
        return self._up.taken

    @property
    def host_bytes(self) -> int:
        return self._host.taken

    # -- who there is --------------------------------------------------------------------------------

    def register(self, name: str, source: Source) -> None:
        """Take up the adapter of a folder, which is looked into whole. It stays on disk until somebody holds it.

        Raises:
            DuplicateNameError: the name is taken.
            ConfigError: it is larger than a tier.
            FileFormatError, AttachError: as `Source.check`.
        """
        self._check_name(name)
        packed = source.check(self._forms)
        self._entries[name] = self._new(name, source, packed.nbytes, self._place.cost(packed))

    def put(self, adapter: Adapter) -> None:
        """Take up a copy of an adapter, which waits in host memory to answer.

        Raises:
            DuplicateNameError: its name is taken.
            ConfigError: it is larger than a tier, or there is no room for it in host memory.
            AttachError, TargetError, UnsupportedError: it cannot be attached to this model.
        """
        self._check_name(adapter.name)
        packed = self._forms.serving(adapter)
        entry = self._new(adapter.name, None, packed.nbytes, self._place.cost(packed))
        if not self._host_room(entry.nbytes):
            raise self._no_room(entry)
        entry.packed = packed
        self._entries[entry.name] = entry
        self._host.add(entry)
        self._host.taken += entry.nbytes

    def adopt(self, name: str) -> None:
        """Take up an adapter that acts already.

        Raises:
            DuplicateNameError: the name is taken.
            ConfigError: it is larger than a tier, or there is no room for it in one.
        """
        self._check_name(name)
        size = self._place.size(name)
        entry = self._new(name, None, size, size)
        if not (self._active_room(size) and self._host_room(size)):
            raise self._no_room(entry)
        self._entries[name] = entry
        self._up.add(entry)
        self._host.taken += size
        self._up.taken += size

    def forget(self, name: str) -> None:
        """Know an adapter no more; its folder stays.

        Raises:
            AttachError: it is held.
        """
        entry = self._free(name)
        if entry in self._up:
            self._place.down(name)
            self._up.remove(entry)
            self._up.taken -= entry.acting
            self._host.taken -= entry.nbytes
        elif entry.packed is not None or entry.reading is not None:
            self._host.remove(entry)
            self._host.taken -= entry.nbytes
        if entry.reading is not None:
            del self._reading[entry.reading]
        self._place.forget(name)
        del self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def tier(self, name: str) -> Tier:
        """Where an adapter is now."""
        entry = self._entry(name)
        return "active" if entry in self._up else "disk" if entry.packed is None else "host"

    # -- bringing up and down ------------------------------------------------------------------------

    def hold(self, name: str) -> Hold | Waiting:
        """Have an adapter act, and keep it so; or why that takes longer.

        Raises:
            UnknownNameError: there is none of that name.
            FileFormatError, StorageError, AttachError: what went wrong with this one; asking again tries again.
            ConfigError: in training it became larger than a tier.
        """
        self.settle()
        entry = self._entry(name)
        if entry.error is not None:
            error, entry.error = entry.error, None
            raise error
        if entry not in self._up and (waiting := self._raise(entry)) is not None:
            return waiting
        entry.holds += 1
        self._up.touch(entry)
        return Hold(name, lambda: self._released(entry))

    def lower(self, name: str, to: Literal["host", "disk"] = "host") -> None:
        """Take an adapter down now, if it is higher up.

        Raises:
            AttachError: it is held.
            ConfigError: it has no folder to go to.
            StorageError: the disk refused; it is in host memory then.
        """
        entry = self._free(name)
        if entry in self._up:
            self._down(entry)
        if to == "disk" and entry.packed is not None:
            if not self._may_leave(entry):
                raise ConfigError(f"adapter {name!r} has no folder to go to.")
            self._to_disk(entry)

    def settle(self) -> list[str]:
        """Take in what was read by now; whose reading ended, well or badly."""
        done = [future for future in self._reading if future.done()]
        return [self._take_in(future) for future in done]

    def wait(self, seconds: float | None = None) -> list[str]:
        """Wait until one that is being read is there; then as `settle`."""
        if self._reading:
            wait_for(list(self._reading), seconds, FIRST_COMPLETED)
        return self.settle()

    def close(self) -> None:
        """Read no more."""
        self._reader.shutdown(cancel_futures=True)

    def _raise(self, entry: Entry) -> Waiting | None:
        self._check_size(entry)  # training makes it larger
        if entry.packed is None:
            return self._read(entry)
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
            entry.packed, entry.stale = None, True
        return None

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
            self._keep(entry, packed)
            self._host.add(entry)
            self._host.taken += entry.nbytes
        return entry.name

    def _released(self, entry: Entry) -> None:
        entry.holds -= 1
        self._up.touch(entry)

    # -- making room ---------------------------------------------------------------------------------

    def _active_room(self, nbytes: int) -> bool:
        """Whether so many bytes are free where adapters act, once those used least recently have come down."""
        for entry in self._up.leaving(nbytes, lambda entry: not entry.holds):
            self._down(entry)
        return self._up.taken + nbytes <= self._up.budget

    def _host_room(self, nbytes: int) -> bool:
        """Whether so many bytes are free in host memory, once those used least recently have left it."""
        for entry in self._host.leaving(nbytes, self._may_leave):
            self._to_disk(entry)
        return self._host.taken + nbytes <= self._host.budget

    def _may_leave(self, entry: Entry) -> bool:
        return not entry.stale or self._home is not None

    def _down(self, entry: Entry) -> None:
        changed = self._place.down(entry.name)
        self._up.remove(entry)
        self._up.taken -= entry.acting
        self._host.add(entry)
        if changed is not None:
            self._host.taken -= entry.nbytes
            self._keep(entry, changed)
            entry.stale = True
            self._host.taken += entry.nbytes
            self._host_room(0)

    def _keep(self, entry: Entry, packed: Packed) -> None:
        entry.packed, entry.nbytes, entry.acting = packed, packed.nbytes, self._place.cost(packed)

    def _to_disk(self, entry: Entry) -> None:
        assert entry.packed is not None
        if entry.stale:
            assert self._home is not None
            source = self._home(entry.name, entry.packed)
            source.write(entry.name, entry.packed)
            entry.source, entry.stale = source, False
        entry.packed = None
        self._host.remove(entry)
        self._host.taken -= entry.nbytes

    # -- entries -------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnknownNameError(
                f"no adapter {name!r} is registered.{suggest(name, self._entries)}"
            )
        return self._entries[name]

    def _free(self, name: str) -> Entry:
        entry = self._entry(name)
        if entry.holds:
            raise AttachError(f"adapter {name!r} is in use; release it first.")
        return entry

    def _check_name(self, name: str) -> None:
        if name in self._entries:
            raise DuplicateNameError(
                f"an adapter {name!r} is registered already; forget it first, or choose another name."
            )

    def _new(self, name: str, source: Source | None, nbytes: int, acting: int) -> Entry:
        entry = Entry(name, source, nbytes, acting)
        self._check_size(entry)
        return entry

    def _check_size(self, entry: Entry) -> None:
        if entry.nbytes > self._budgets.host or entry.acting > self._budgets.active:
            raise ConfigError(
                f"adapter {entry.name!r} takes {entry.acting:,} bytes where it acts and {entry.nbytes:,} in host "
                f"memory, where all may take {self._budgets.active:,} and {self._budgets.host:,}; give them more."
            )

    def _no_room(self, entry: Entry) -> ConfigError:
        return ConfigError(
            f"there is no room for adapter {entry.name!r}: all that could make way is held, or has no folder to go to. "
            "Release some, or give the tiers more bytes."
        )
