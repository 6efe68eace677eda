"""Time shared out among rooms: every moment belongs to the room that was entered last.

    Σ over rooms = the whole,   because each mark ends one stretch and begins the next

On a CPU a mark is the time. On an accelerator it is an event in the stream of work, so that a stretch is what the
device took to get from one to the next, with what it waited for the CPU meanwhile.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from trimtab.engine.rooms import Room

P = ParamSpec("P")
R = TypeVar("R")
Place = tuple[Room, bool]
"""A room, and whether gradients are computed."""


class Clock:
    """Runs between `start` and `stop`; outside, entering and leaving rooms does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._marks: _Times | _Events = _Times() if device.type == "cpu" else _Events(device)
        self._rooms: list[Room] = []  # the innermost last
        self._now: Place | None = None
        self._numbers: list[int] = []
        self._made: list[Room] = []
        self.backward = False
        """Whether gradients are computed."""

    # -- a stretch ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, in the room ``other``."""
        self._marks.wait()
        self._rooms, self._numbers, self._made = ["other"], [], []
        self._turn()

    def stop(self) -> dict[Place, float]:
        """Seconds of each room, forward and backward, since `start`."""
        self._mark(None)
        self._marks.wait()
        self._rooms = []
        return self._marks.taken()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not counted."""
        self._mark(None)
        try:
            yield
        finally:
            self._turn()

    # -- rooms ----------------------------------------------------------------------------------------

    def enter(self, room: Room) -> None:
        """Be in a room until `leave`."""
        if self._rooms:
            self._rooms.append(room)
            self._turn()

    def leave(self) -> None:
        """Be again where one was before."""
        if len(self._rooms) > 1:
            self._rooms.pop()
            self._turn()

    @contextmanager
    def inside(self, room: Room) -> Iterator[None]:
        """`enter`, and in any case `leave`."""
        self.enter(room)
        try:
            yield
        finally:
            self.leave()

    def timed(self, room: Room, function: Callable[P, R]) -> Callable[P, R]:
        """A function each of whose calls is in a room."""

        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.inside(room):
                return function(*args, **kwargs)

        return called

    @property
    def depth(self) -> int:
        """How many rooms are open."""
        return len(self._rooms)

    def go(self, room: Room, depth: int) -> None:
        """Be in a room that is the only one above the first ``depth``."""
        self._rooms[depth:] = [room]
        self._turn()

    # -- what was made where --------------------------------------------------------------------------

    def room_of(self, number: int) -> Room:
        """The room in which the autograd node of that sequence number was made, since `start`."""
        place = bisect_right(self._numbers, number) - 1
        return self._made[place] if place >= 0 else "other"

    # -- marks ----------------------------------------------------------------------------------------

    def _turn(self) -> None:
        place = self._rooms[-1], self.backward
        if place != self._now:
            self._mark(place)
            if not self.backward:
                self._numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
                self._made.append(place[0])

    def _mark(self, place: Place | None) -> None:
        self._marks.add(self._now)
        self._now = place


class _Times:
    """Marks on a CPU."""

    def __init__(self) -> None:
        self._spent: dict[Place, float] = defaultdict(float)
        self._last = 0.0

    def add(self, ending: Place | None) -> None:
        """A mark, which ends a stretch of that place."""
        now = time.perf_counter()
        if ending is not None:
            self._spent[ending] += now - self._last
        self._last = now

    def wait(self) -> None:
        """Until the device has done what it was given."""

    def taken(self) -> dict[Place, float]:
        """The seconds of each place since the last time."""
        found, self._spent = dict(self._spent), defaultdict(float)
        return found


class _Events:
    """Marks on an accelerator: each an event in its stream, and the place whose stretch it ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[Any, Place | None]] = []

    def add(self, ending: Place | None) -> None:
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        self._events.append((event, ending))

    def wait(self) -> None:
        torch.accelerator.synchronize(self._device)

    def taken(self) -> dict[Place, float]:
        spent: dict[Place, float] = defaultdict(float)
        for (before, _), (after, place) in zip(self._events, self._events[1:], strict=False):
            if place is not None:
                spent[place] += before.elapsed_time(after) / 1e3
        self._events = []
        return dict(spent)
