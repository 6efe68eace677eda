"""Consecutive rows, or consecutive tokens of a packed row, that have one owner."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from trimtab.adapt.route import Owner, Route


class Stretch(NamedTuple):
    """From ``start`` to ``stop`` of the rows, or of the tokens of the only row; ``unit`` is the first of its units."""

    owner: Owner
    start: int
    stop: int
    unit: int = -1

    @property
    def length(self) -> int:
        return self.stop - self.start


def stretches(
    route: Route, rows: int, length: int, told: Container[Owner], each: Container[Owner] = ()
) -> list[Stretch] | None:
    """All there are, one after the other; those of owners in ``each``, document by document. Owners that are not
    ``told`` apart, and cells that are nobody's, count as the bare base. None where several rows are packed, or the
    route has other rows.
    """
    if route.spans is None:
        if route.every or len(route.owners) != rows:
            return None
        units = [Stretch(owner, row, row + 1, row) for row, owner in enumerate(route.owners)]
        end = rows
    elif rows != 1:
        return None
    else:
        own = enumerate(zip(route.owners, route.spans, strict=True))
        units = sorted(
            (Stretch(owner, span.start, span.stop, number) for number, (owner, span) in own),
            key=lambda unit: unit.start,
        )
        end = length
    found: list[Stretch] = []
    for unit in (*units, Stretch((), end, end)):
        owner = unit.owner if unit.owner in told else ()
        start = found[-1].stop if found else 0
        if unit.start > start:  # a gap is nobody's
            _append(found, Stretch((), start, unit.start))
        _append(found, unit._replace(owner=owner), owner in each)
    return [stretch for stretch in found if stretch.length]


def _append(found: list[Stretch], new: Stretch, alone: bool = False) -> None:
    if found and found[-1].owner == new.owner and not alone:
        new = found.pop()._replace(stop=new.stop)
    found.append(new)
