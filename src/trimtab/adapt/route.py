"""Routes: who acts on which row, or on which document of a packed row; and how a tensor splits by owner.

A route names an owner per *unit* (a row of the batch, or a document of a packed row), never a token
range, because sites see different token orders. `Layout` finds the owners of the positions of one
tensor at one site, from its shape; where that cannot be known it raises `RouteError`.

Shapes: U units, B rows, T tokens of a row, N = B·T flattened tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from trimtab.errors import RouteError

Owner = tuple[str, ...]
"""Names of the adapters that act, innermost first; empty is the bare base."""
SLOTS = "*slots*"
"""Who acts where adapters lie in slots (`trimtab.adapt.stack`); no adapter can have such a name."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``stop`` of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Route:
    """``owners[u]`` acts on unit u. ``spans`` says where documents lie; None: a unit is a row.

    A route with one owner and ``every`` true covers any number of rows. ``slots[u]`` is where the adapter of unit u
    lies in the model's `trimtab.adapt.stack.Stack`; -1 where it lies in none, and ``owners[u]`` acts.

    Raises:
        RouteError: another number of slots than of owners, or a unit that has both.
    """

    owners: tuple[Owner, ...]
    spans: tuple[Span, ...] | None = None
    every: bool = False
    slots: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        slots = (-1,) * len(self.owners) if self.slots is None else self.slots
        if len(slots) != len(self.owners):
            raise RouteError(f"{len(self.owners)} units have {len(slots)} slots; -1 is for none.")
        if any(owner and slot >= 0 for owner, slot in zip(self.owners, slots, strict=True)):
            raise RouteError("a unit has an owner and a slot; an adapter acts by either, not both.")

    @classmethod
    def everyone(cls, owner: Owner) -> Route:
        return cls((owner,), every=True)

    @property
    def single(self) -> Owner | None:
        """The one owner of all units, or None when they differ."""
        return self.owners[0] if self.every or len(set(self.owners)) == 1 else None

    @property
    def acting(self) -> tuple[Owner, ...]:
        """Who acts on each unit, `SLOTS` among them."""
        if self.slots is None:
            return self.owners
        units = zip(self.owners, self.slots, strict=True)
        return tuple((SLOTS,) if slot >= 0 else owner for owner, slot in units)

    def expanded(self, rows: int, *, generating: bool) -> Route:
        """The route for a batch of ``rows`` rows: generation may have repeated each row (beams)."""
        if self.every or self.spans is not None or rows == len(self.owners):
            return self
        if generating and rows % len(self.owners) == 0:
            times = rows // len(self.owners)
            slots = self.slots and tuple(slot for slot in self.slots for _ in range(times))
            return Route(tuple(owner for owner in self.owners for _ in range(times)), slots=slots)
        raise RouteError(
            f"the batch has {rows} rows, but the route names {len(self.owners)} owners. "
            "Pass one adapter name (or None) per row to trimtab.rows()."
        )


def units_at(route: Route, rows: int, length: int) -> Tensor:
    """(B, T) number of the unit of each position; -1 where nobody's.

    Raises:
        RouteError: another number of rows than the route names owners.
    """
    if route.spans is None:
        if len(route.owners) != rows:
            raise RouteError(
                f"attention was given {rows} rows, the route names {len(route.owners)} owners."
            )
        return torch.arange(rows)[:, None].expand(rows, length)
    found = torch.full((rows, length), -1)
    for unit, span in enumerate(route.spans):
        found[span.row, span.start : span.stop] = unit
    return found


class Part:
    """The positions of a tensor that one owner acts on.

    ``index`` selects along the first axis of the (possibly flattened) tensor: None is everything.
    ``units`` gives the unit of each selected position; None when every position is its own unit.
    """

    __slots__ = ("flat", "index", "owner", "unit_count", "units")

    def __init__(
        self,
        owner: Owner,
        index: slice | Tensor | None,
        units: Tensor | None,
        flat: bool,
        unit_count: int,
    ) -> None:
        self.owner = owner
        self.index = index
        self.units = units
        self.flat = flat
        self.unit_count = unit_count

    def take(self, x: Tensor) -> Tensor:
        """This owner's positions of x: a view where they are contiguous."""
        if self.flat:
            x = x.flatten(0, 1)
        return x if self.index is None else x[self.index]

    def members(self, device: torch.device) -> Tensor:
        """The units of this part."""
        return (
            torch.arange(self.unit_count, device=device)
            if self.units is None
            else self.units.unique().to(device)
        )

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values per unit (U, or U by channels), shaped to broadcast over this part of a tensor."""
        if (
            self.units is not None and values.shape[0] < self.unit_count
        ):  # decided before rows became beams
            values = values.repeat_interleave(self.unit_count // values.shape[0], dim=0)
        chosen = values if self.units is None else values[self.units.to(values.device)]
        if chosen.shape[0] != like.shape[0]:
            if like.shape[0] % chosen.shape[0]:
                raise RouteError(
                    f"{chosen.shape[0]} values cannot be spread over {like.shape[0]} positions."
                )
            chosen = chosen.repeat_interleave(like.shape[0] // chosen.shape[0], dim=0)
        middle = (1,) * (like.dim() - chosen.dim()) if chosen.dim() > 1 else (1,) * (like.dim() - 1)
        return chosen.reshape(chosen.shape[0], *middle, *chosen.shape[1:])


class Layout:
    """The parts of one tensor shape, which together cover it, and how to join them again."""

    __slots__ = ("inverse", "parts", "shape")

    def __init__(
        self, parts: Sequence[Part], shape: tuple[int, ...], inverse: Tensor | None
    ) -> None:
        self.parts = parts
        self.shape = shape
        self.inverse = inverse

    @property
    def whole(self) -> bool:
        """Whether there is one part, shaped as the tensor is."""
        return len(self.parts) == 1 and not self.parts[0].flat

    def rows(self, x: Tensor) -> Tensor:
        """x without its leading axes, its rows in the order of the parts."""
        return torch.cat([part.take(x).flatten(0, -2) for part in self.parts])

    def counts(self, x: Tensor) -> list[int]:
        """How many of these rows each part has."""
        return [part.take(x).shape[:-1].numel() for part in self.parts]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole from the parts' tensors, in the original order."""
        whole = pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))
        if self.inverse is not None:
            whole = whole[self.inverse]
        return whole.unflatten(0, self.shape) if self.parts[0].flat else whole


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive positions of one unit along the (flattened) first axis."""

    owner: Owner
    unit: int
    start: int
    stop: int

    def arange(self, start: int) -> Tensor:
        """As many consecutive numbers as the run is long."""
        return torch.arange(start, start + self.stop - self.start)


def layout(route: Route, x: Tensor, batch: tuple[int, int] | None) -> Layout:
    """Split a tensor by owner. (Plain integers all the way, so that it traces under ``torch.compile``.)

    Args:
        route: the route of this forward, already expanded to its rows.
        x: what a site was given; its leading axes are (B, …), (B, T, …) or (B·T, …).
        batch: (B, T) of this forward, which tell flattened tokens from rows; None where it is not known.

    Raises:
        RouteError: the shape does not tell which position belongs to which unit.
    """
    stacked = route.slots is not None
    if stacked:
        route = replace(route, owners=route.acting, slots=None)
    if route.spans is not None:
        return _by_document(route, route.spans, x, batch)
    # tokens of rows in slots must be told apart also where all are in some
    rows_alone = route.every or x.shape[0] == len(route.owners)
    if route.single is not None and (rows_alone or not stacked):
        count = x.shape[0] if route.every else len(route.owners)
        return Layout([Part(route.owners[0], None, None, False, count)], (), None)
    rows = len(route.owners)
    each = 1
    if x.shape[0] != rows:
        each = x.shape[0] // rows
        tokens = batch is not None and batch[1] == each and x.shape[0] == rows * each
        if x.dim() != 2 or not tokens:
            raise RouteError(
                f"a site was given a tensor of shape {tuple(x.shape)} in a batch of {rows} rows with different "
                "adapters; which of its positions belong to which row cannot be known. Route the whole batch "
                "to one adapter, or leave this module out of the adapters' targets."
            )
    runs = [Run(owner, u, u * each, (u + 1) * each) for u, owner in enumerate(route.owners)]
    return _grouped(runs, rows, x, (), flat=False)


def _by_document(
    route: Route, spans: Sequence[Span], x: Tensor, batch: tuple[int, int] | None
) -> Layout:
    rows, width = (x.shape[0], x.shape[1]) if batch is None and x.dim() > 2 else batch or (0, 0)
    flat = x.dim() > 1 and tuple(x.shape[:2]) == (rows, width)
    if not flat and not (x.dim() == 2 and x.shape[0] == rows * width):
        raise RouteError(
            f"a site was given a tensor of shape {tuple(x.shape)} in a packed batch; documents cannot be told "
            "apart in it. Send such models padded batches, one document per row."
        )
    runs: list[Run] = []
    end = 0
    for unit, span in sorted(enumerate(spans), key=lambda item: (item[1].row, item[1].start)):
        start, stop = span.row * width + span.start, span.row * width + span.stop
        if start > end:
            runs.append(Run((), 0, end, start))
        runs.append(Run(route.owners[unit], unit, start, stop))
        end = stop
    if end < rows * width:
        runs.append(Run((), 0, end, rows * width))
    shape = (rows, width) if flat else ()
    if route.single is not None:  # padding may be edited too: nobody reads it
        units = torch.cat([torch.full((run.stop - run.start,), run.unit) for run in runs]).to(
            x.device
        )
        return Layout([Part(route.single, None, units, flat, len(spans))], shape, None)
    return _grouped(runs, len(spans), x, shape, flat=flat)


def _grouped(
    runs: Sequence[Run], count: int, x: Tensor, shape: tuple[int, ...], *, flat: bool
) -> Layout:
    """Parts by owner, in the order of first appearance; positions that are contiguous become a slice."""
    by_owner: dict[Owner, list[Run]] = {}
    for run in runs:
        by_owner.setdefault(run.owner, []).append(run)
    parts: list[Part] = []
    moved: dict[int, int] = {}
    end = 0
    for owner, own in by_owner.items():
        for run in own:
            moved[run.start] = end
            end += run.stop - run.start
        contiguous = all(a.stop == b.start for a, b in pairwise(own))
        index: slice | Tensor = slice(own[0].start, own[-1].stop)
        if not contiguous:
            index = torch.cat([run.arange(run.start) for run in own]).to(x.device)
        units = torch.cat([torch.full((run.stop - run.start,), run.unit) for run in own]).to(
            x.device
        )
        parts.append(Part(owner, index, units, flat, count))
    inverse = None
    if any(start != target for start, target in moved.items()):
        inverse = torch.cat([run.arange(moved[run.start]) for run in runs]).to(x.device)
    return Layout(parts, shape, inverse)
