"""The order in which examples are visited, and the cursor that lets every stage of the chain resume.

The chain is a row of generators: rows -> records -> tokens -> steps. Each yields ``(item, cursor)``;
the cursor that came with an item, given back to `visit`, continues with the item after it. So any
stage can stop anywhere, and what must be stored to resume is one small JSON object.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from typing import TypedDict, TypeVar

from trimtab.errors import DataError

T = TypeVar("T")


class Cursor(TypedDict):
    """The state of the chain after an item: ``position`` items of ``epoch`` have been visited.

    ``items``, ``seed`` and ``digest`` say what was being visited, so that resuming over other data or
    in another order is an error.
    """

    epoch: int
    position: int
    items: int
    seed: int | None
    digest: str


def visit(
    items: Sequence[T],
    *,
    epochs: int | None = 1,
    seed: int | None = None,
    digest: str = "",
    cursor: Cursor | None = None,
) -> Iterator[tuple[T, Cursor]]:
    """Walk ``items`` for ``epochs`` (None: for ever), each item once an epoch.

    Without a ``seed`` the order is that of the sequence; with one it is a permutation drawn from the
    seed and the epoch. ``cursor`` continues after the item that it came with. ``digest`` identifies
    the data. Raises `DataError` when the cursor belongs to other data or another order.
    """
    here = Cursor(epoch=0, position=0, items=len(items), seed=seed, digest=digest)
    if cursor is not None:
        _check_same(cursor, here)
        here = cursor
    epoch, position = here["epoch"], here["position"]
    while epochs is None or epoch < epochs:
        order = epoch_order(len(items), seed, epoch)
        while position < len(order):
            item = items[order[position]]
            position += 1
            yield (
                item,
                Cursor(epoch=epoch, position=position, items=len(items), seed=seed, digest=digest),
            )
        epoch, position = epoch + 1, 0
        if not order:
            return


def epoch_order(count: int, seed: int | None, epoch: int) -> Sequence[int]:
    """The order of ``count`` items in that epoch; the same on every machine and in every process."""
    if seed is None:
        return range(count)
    order = array("q", range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def _check_same(cursor: Cursor, here: Cursor) -> None:
    for name, saved, now in (
        ("number of items", cursor["items"], here["items"]),
        ("seed", cursor["seed"], here["seed"]),
        ("content hash", cursor["digest"], here["digest"]),
    ):
        if saved != now:
            raise DataError(
                f"cannot resume: the {name} was {saved!r} when the run was saved and is {now!r} now. "
                "Resume with the same data file and seed, or start a new run."
            )
