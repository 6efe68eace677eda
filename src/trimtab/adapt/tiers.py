"""Many adapters of one base in three tiers: a few that act, more in host memory, and all others on disk.

    active   attached to the model, or wherever `Active` puts them
    host     packed (`trimtab.adapt.packed`)
    disk     a folder (`trimtab.adapt.sources`)

Who needs an adapter holds it: `Tiers.hold` brings it up, or says what to wait for. Who makes room for whom says
`trimtab.adapt.moves`. A name can be given to another adapter, or forgotten, at any time: who has the one that it was
keeps it until it is released.

Folders are read on threads of their own. All else is for one thread: the one that runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, final

from trimtab.adapt.active import Active, Hold, Waiting
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.claim import Claim
from trimtab.adapt.fit import Forms
from trimtab.adapt.moves import Budgets, Home, Moves, Tier
from trimtab.adapt.packed import Form
from trimtab.adapt.shelf import Entry
from trimtab.adapt.sources import Source
from trimtab.errors import (
    AttachError,
    ConfigError,
    DuplicateNameError,
    UnknownNameError,
    suggest,
)

__all__ = ["Budgets", "Tier", "Tiers"]


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
        self, forms: Forms, place: Active, budgets: Budgets, home: Home | None = None
    ) -> None:
        self._forms = forms
        self._place = place
        self._moves = Moves(forms, place, budgets, home)
        self._entries: dict[str, Entry] = {}

    @property
    def active_bytes(self) -> int:
        return self._moves.active_bytes

    @property
    def host_bytes(self) -> int:
        return self._moves.host_bytes

    # -- who there is --------------------------------------------------------------------------------

    def register(self, name: str, source: Source) -> None:
        """Take up the adapter of a folder, which is looked into whole. It stays on disk until somebody holds it.

        Raises:
            DuplicateNameError: the name is taken.
            ConfigError: it is larger than a tier.
            FileFormatError, AttachError: as `Source.check`.
        """
        self._check_name(name)
        self._entries[name] = self._of(name, source)

    def replace(self, name: str, source: Source) -> None:
        """Give a name to the adapter of another folder, or of the same one anew. Who has the one before keeps it.

        Raises:
            UnknownNameError: there is none of that name.
            ConfigError, FileFormatError, AttachError: as `register`; the one before stays then.
        """
        before = self._entry(name)
        self._entries[name] = self._of(name, source)
        self._forget(before)

    def put(self, adapter: Adapter) -> None:
        """Take up a copy of an adapter, which waits in host memory to answer.

        Raises:
            DuplicateNameError: its name is taken.
            ConfigError: it is larger than a tier, or there is no room for it in host memory.
            AttachError, TargetError, UnsupportedError: it cannot be attached to this model.
        """
        self._check_name(adapter.name)
        packed = self._forms.serving(adapter)
        entry = Entry(adapter.name, None, packed.form, packed.nbytes, self._place.cost(packed))
        self._moves.check_size(entry)
        self._moves.take(entry, packed)
        self._entries[entry.name] = entry

    def adopt(self, name: str) -> None:
        """Take up an adapter that acts already.

        Raises:
            DuplicateNameError: the name is taken.
            ConfigError: it is larger than a tier, or there is no room for it in one.
        """
        if name in self._entries:
            raise self._taken(name)
        size = self._place.size(name)
        entry = Entry(name, None, None, size, size)
        self._moves.check_size(entry)
        self._moves.adopt(entry)
        self._entries[name] = entry

    def forget(self, name: str) -> None:
        """Know an adapter no more; its folder stays. Who has it keeps it until it is released."""
        entry = self._entry(name)
        del self._entries[name]
        self._forget(entry)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def acts(self, name: str) -> bool:
        """Whether one of these that has or had this name is up: it may be forgotten by now, and held."""
        return self._moves.acts(name)

    def tier(self, name: str) -> Tier:
        """Where an adapter is now."""
        return self._moves.tier(self._entry(name))

    def form(self, name: str) -> Form | None:
        """What is known of an adapter wherever it is; None of one that was adopted and has been up ever since."""
        return self._entry(name).form

    # -- bringing up and down ------------------------------------------------------------------------

    def hold(self, name: str) -> Hold | Waiting:
        """Have an adapter act, and keep it so; or why that takes longer.

        Raises:
            UnknownNameError: there is none of that name.
            FileFormatError, StorageError, AttachError: what went wrong with this one; asking again tries again.
            ConfigError: in training it became larger than a tier.
        """
        self.settle()
        return self._moves.hold(self._entry(name))

    def claim(self, name: str) -> Claim:
        """The right to hold an adapter later, whatever becomes of its name.

        Raises:
            UnknownNameError: there is none of that name.
        """
        return Claim(self._moves, self._entry(name))

    def lower(self, name: str, to: Literal["host", "disk"] = "host") -> None:
        """Take an adapter down now, if it is higher up.

        Raises:
            AttachError: it is held.
            ConfigError: it has no folder to go to.
            StorageError: the disk refused; it is in host memory then.
        """
        entry = self._entry(name)
        if entry.holds:
            raise AttachError(f"adapter {name!r} is in use; release it first.")
        if self._moves.tier(entry) == "active":
            self._moves.down(entry)
        if to == "disk" and entry.packed is not None:
            if not self._moves.may_leave(entry):
                raise ConfigError(f"adapter {name!r} has no folder to go to.")
            self._moves.to_disk(entry)

    @property
    def reading(self) -> bool:
        """Whether an adapter is being read."""
        return self._moves.reading

    def settle(self) -> list[str]:
        """Take in what was read by now; whose reading ended, well or badly."""
        return self._moves.settle()

    def wait(self, seconds: float | None = None) -> list[str]:
        """Wait until one that is being read is there; then as `settle`."""
        return self._moves.wait(seconds)

    def close(self) -> None:
        """Read no more."""
        self._moves.close()

    # -- entries -------------------------------------------------------------------------------------

    def _of(self, name: str, source: Source) -> Entry:
        packed = source.check(self._forms)
        entry = Entry(name, source, packed.form, packed.nbytes, self._place.cost(packed))
        self._moves.check_size(entry)
        return entry

    def _forget(self, entry: Entry) -> None:
        entry.known = False
        self._moves.leave(entry)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnknownNameError(
                f"no adapter {name!r} is registered.{suggest(name, self._entries)}"
            )
        return self._entries[name]

    def _check_name(self, name: str) -> None:
        if name in self._entries:
            raise self._taken(name)
        if self._place.has(name) and not self._moves.acts(name):
            raise DuplicateNameError(
                f"an adapter {name!r} is attached already, and not registered; adopt it, detach it, or choose another "
                "name."
            )

    def _taken(self, name: str) -> DuplicateNameError:
        return DuplicateNameError(
            f"an adapter {name!r} is registered already; replace it, forget it first, or choose another name."
        )
