"""What one forward of serving is of: pieces of texts in a row, or a token of each row; and who acts on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from trimtab.adapt.pages import Unit
from trimtab.adapt.route import Route, Span
from trimtab.engine.serve.request import Request
from trimtab.engine.serve.seats import NONE


@dataclass(frozen=True, slots=True)
class Piece:
    """The next ``count`` tokens of a request's text, which this forward reads."""

    request: Request
    count: int

    @property
    def unit(self) -> Unit:
        r = self.request
        lead = r.lead if not r.filled else 0
        return Unit(tuple(r.pages), r.filled, self.count, lead)

    @property
    def ids(self) -> list[int]:
        read = self.request.read
        return self.request.text[read : read + self.count]

    @property
    def positions(self) -> range:
        read = self.request.read
        return range(read, read + self.count)

    @property
    def ends(self) -> bool:
        """Whether its text has been read then."""
        return self.count == self.request.unread


def place_of(request: Request) -> tuple[bool, int, tuple[str, ...]]:
    """Rows lie in the order of their slots, behind those that have none."""
    return request.slot != NONE, request.slot, request.owner


def route_of(requests: Sequence[Request], spans: tuple[Span, ...] | None, *, each: bool) -> Route:
    """Who acts on whom; one owner of everything, unless ``each`` says that units matter."""
    owners = tuple(request.owner for request in requests)
    slots = tuple(request.slot for request in requests)
    if set(slots) != {NONE}:
        return Route(owners, spans, slots=slots)
    if len(set(owners)) == 1 and not each:
        return Route.everyone(owners[0])
    return Route(owners, spans)


def spans_of(pieces: Sequence[Piece]) -> tuple[Span, ...]:
    """Where in the row each piece lies."""
    ends = list(accumulate(piece.count for piece in pieces))
    return tuple(Span(0, start, end) for start, end in pairwise([0, *ends]))
