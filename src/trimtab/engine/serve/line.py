"""The line of requests that wait: for pages, for another's prompt to be read, or for an adapter.

They are let in in their order. Past them may go who waits for another's prompt, or for an adapter that is being read:
that is waited for by those alone who need it. Where there is no room for an adapter, no later request has another one
come up, so that all that are held are released in the end, and the oldest finds room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import final

from trimtab.adapt.active import Waiting
from trimtab.adapt.tiers import Tiers
from trimtab.engine.serve.request import Request
from trimtab.engine.serve.seats import Seats
from trimtab.errors import AnswerError

PATIENCE = 0.05
"""Seconds until those who may have come meanwhile are looked at, while an adapter is read and nobody is answered."""


@final
class Line:
    """Of one loop; ``seats`` and ``tiers`` are where adapters come."""

    def __init__(self, seats: Seats, tiers: Tiers) -> None:
        self._seats = seats
        self._tiers = tiers
        self._waiting: deque[Request] = deque()
        self._lacking: Request | None = None
        """The first one for whose adapter there is no room."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting)

    def join(self, request: Request) -> None:
        """Wait behind all others."""
        self._waiting.append(request)

    def again(self, request: Request) -> None:
        """Wait before all others, as one that was let in already."""
        self._waiting.appendleft(request)

    def leave(self) -> None:
        """Those who are done wait no more."""
        self._waiting = deque(request for request in self._waiting if not request.done)

    def let_in(self, enter: Callable[[Request], bool]) -> None:
        """Hand over those whose adapters are there; ``enter`` says of one whether there is a place for it."""
        passed: list[Request] = []
        self._lacking = None
        while self._waiting:
            request = self._waiting.popleft()
            leader = request.behind
            read = leader is None or leader.done or leader.answering
            if not (read and self._there(request)):
                passed.append(request)
            elif not enter(request):
                self._waiting.appendleft(request)
                break
        self._waiting.extendleft(reversed(passed))
        if self._lacking is None:
            self._seats.nobody_waits()

    def nobody_runs(self) -> None:
        """There is nothing to do until an adapter has been read; if none is, who lacks room would do so for ever."""
        if self._tiers.reading:
            self._tiers.wait(PATIENCE)
        elif self._lacking is not None:
            self._lacking.error = no_room(self._lacking.name)

    def _there(self, request: Request) -> bool:
        """Whether a request's adapter is there; if it never will be, the request has an error."""
        actor = request.actor
        if not actor.there and self._lacking is not None:
            return False
        try:
            waiting = actor.come()
        except Exception as error:  # of this adapter alone
            request.error = error
            return False
        if waiting is None:
            request.root = None if request.remembers else actor.version
        elif waiting is not Waiting.READING:
            self._lacking = request
        return waiting is None


def no_room(name: str) -> AnswerError:
    """For an adapter that waits for others which nobody is answered by."""
    return AnswerError(
        f"there is no room for adapter {name!r}: others are held, though nobody is answered by them. Release them, or "
        "give the engine larger budgets."
    )
