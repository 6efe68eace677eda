"""Routes: who acts on which row, or on which document of a packed row; and how a tensor splits by owner.

A route names an owner per *unit* (a row of the batch, or a document of a packed row), never a token
range, because sites see different token orders. `Layout` finds the owners of the positions of one
tensor at one site, from its shape; where that cannot be known it raises `RouteError`.

Shapes: U units, B rows, T tokens of a row, N = B·T flattened tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import RouteError

Owner = tuple[str, ...]
"""Names of the adapters that act, innermost first; empty is the bare base."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``stop`` of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Route:
    """``owners[u]`` acts on unit u. ``spans`` says where documents lie; None: a unit is a row.

    A route with one owner and ``every`` true covers any number of rows.
    """

    owners: tuple[Owner, ...]
    spans: tuple[Span, ...] | None = None
    every: bool = False

    @classmethod
    def everyone(cls, owner: Owner) -> Route:
        return cls((owner,), every=True)

    @property
    def names(self) -> set[str]:
        return {name for owner in self.owners for name in owner}

    @property
    def single(self) -> Owner | None:
        """The one owner of all units, or None when they differ."""
        return self.owners[0] if self.every or len(set(self.owners)) == 1 else None

    def expanded(self, rows: int, *, generating: bool) -> Route:
        """The route for a batch of ``rows`` rows: generation may have repeated each row (beams)."""
        if self.every or self.spans is not None or rows == len(self.owners):
            return self
        if generating and rows % len(self.owners) == 0:
            times = rows // len(self.owners)
            return Route(tuple(owner for owner in self.owners for _ in range(times)))
        raise RouteError(
            f"the batch has {rows} rows, but the route names {len(self.owners)} owners. "
            "Pass one adapter name (or None) per row to trimtab.rows()."
        )


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

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole from the parts' tensors, in the original order."""
        whole = pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))
        if self.inverse is not None:
            whole = whole[self.inverse]
        return whole.unflatten(0, self.shape) if self.parts[0].flat else whole


def layout(route: Route, x: Tensor, lengths: Sequence[int]) -> Layout:
    """Split a tensor by owner.

    Args:
        route: the route of this forward, already expanded to its rows.
        x: what a site was given; its leading axes are (B, …), (B, T, …) or (B·T, …).
        lengths: sequence lengths seen in this forward, which tell flattened tokens from rows.

    Raises:
        RouteError: the shape does not tell which position belongs to which unit.
    """
    if route.spans is not None:
        return _by_document(route, x)
    owner = route.single
    if owner is not None:
        count = len(route.owners) if not route.every else x.shape[0]
        return Layout([Part(owner, None, None, False, count)], (), None)
    rows = len(route.owners)
    unit_ids = torch.arange(rows)
    if x.shape[0] != rows:
        length = x.shape[0] // rows
        if x.dim() != 2 or x.shape[0] % rows or length not in lengths:
            raise RouteError(
                f"a site was given a tensor of shape {tuple(x.shape)} in a batch of {rows} rows with different "
                "adapters; which of its positions belong to which row cannot be known. Route the whole batch "
                "to one adapter, or leave this module out of the adapters' targets."
            )
        unit_ids = unit_ids.repeat_interleave(length)
    return _grouped(route, unit_ids, x, flat=False)


def _by_document(route: Route, x: Tensor) -> Layout:
    spans = route.spans
    if spans is None:
        raise AssertionError("called for packed routes only")
    rows = max(span.row for span in spans) + 1
    if x.dim() >= 2 and x.shape[0] >= rows and x.shape[1] >= max(span.stop for span in spans):
        width, flat = x.shape[1], True
        total = x.shape[0] * width
    else:
        raise RouteError(
            f"a site was given a tensor of shape {tuple(x.shape)} in a packed batch; documents cannot be told "
            "apart in it. Send such models padded batches, one document per row."
        )
    unit_ids = torch.full((total,), -1)
    for unit, span in enumerate(spans):
        unit_ids[span.row * width + span.start : span.row * width + span.stop] = unit
    owner = route.single
    if owner is not None:
        part = Part(owner, None, unit_ids.clamp_min(0), flat, len(spans))
        return Layout([part], tuple(x.shape[:2]), None)
    return _grouped(route, unit_ids, x, flat=flat)


def _grouped(route: Route, unit_ids: Tensor, x: Tensor, *, flat: bool) -> Layout:
    """Parts by owner, in the order of first appearance; runs that are contiguous become slices."""
    owners = list(dict.fromkeys(route.owners))
    lookup = torch.tensor([owners.index(owner) for owner in route.owners] + [-1])
    owner_ids = lookup[unit_ids]
    if bool((owner_ids < 0).any()):
        if () not in owners:
            owners.append(())
        owner_ids = owner_ids.where(owner_ids >= 0, torch.tensor(owners.index(())))
    parts: list[Part] = []
    order: list[Tensor] = []
    for number, owner in enumerate(owners):
        chosen = (owner_ids == number).nonzero()[:, 0]
        if not len(chosen):
            continue
        order.append(chosen)
        first, last = int(chosen[0]), int(chosen[-1])
        contiguous = last - first + 1 == len(chosen)
        index: slice | Tensor = slice(first, last + 1) if contiguous else chosen.to(x.device)
        units = unit_ids[chosen].clamp_min(0).to(x.device)
        parts.append(Part(owner, index, units, flat, len(route.owners)))
    permutation = torch.cat(order)
    inverse = None
    if not torch.equal(permutation, torch.arange(len(permutation))):
        inverse = torch.empty_like(permutation)
        inverse[permutation] = torch.arange(len(permutation))
        inverse = inverse.to(x.device)
    return Layout(parts, tuple(x.shape[:2]) if flat else (), inverse)
