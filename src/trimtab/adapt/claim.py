"""An adapter of a registry that somebody will need: that very one, whatever becomes of its name meanwhile.

Who asks for an adapter claims it at once and holds it later, when there is room. One that is forgotten or replaced in
between is found by those who have a claim on it, and by nobody else.
"""

from __future__ import annotations

from typing import final

from trimtab.adapt.active import Hold, Waiting
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.moves import Moves
from trimtab.adapt.shelf import Entry


@final
class Claim:
    """See the module; made by `trimtab.adapt.tiers.Tiers.claim`. For the thread that runs the model."""

    __slots__ = ("_entry", "_moves", "_open")

    def __init__(self, moves: Moves, entry: Entry) -> None:
        self._moves = moves
        self._entry = entry
        self._open = True
        entry.claims += 1

    @property
    def name(self) -> str:
        return self._entry.name

    @property
    def version(self) -> int:
        """Another number once its values may be others; no two adapters have the same."""
        return self._entry.version

    @property
    def up(self) -> bool:
        """Whether it acts now."""
        return self._moves.tier(self._entry) == "active"

    def hold(self) -> Hold | Waiting:
        """As `Tiers.hold`."""
        return self._moves.hold(self._entry)

    @property
    def plain(self) -> bool:
        """Whether a copy of its values acts as it does: it is down, and nothing is said of it besides."""
        return self._moves.plain(self._entry)

    def read(self) -> Waiting | None:
        """Have its values lie in host memory until something else happens; or why that takes longer. Raises as
        `Tiers.hold`."""
        return self._moves.read(self._entry)

    def adapter(self) -> Adapter:
        """It, after `read`, as a value whose tensors are copied at once."""
        packed = self._entry.packed
        assert packed is not None
        return packed.adapter(self.name)

    def release(self) -> None:
        """Need it no more. A second time does nothing."""
        if self._open:
            self._open = False
            self._entry.claims -= 1
            self._moves.leave(self._entry)
