"""Frozen linear layers that read the same x, and low-rank changes of them, as one operation.

    y_l = W_l x + b_l + s_l · B_l A_l (x ∘ D),   D is dropout
    S_l = A_l (x ∘ D),   dS_l = s_l · B_lᵀ dy_l,   dx = Σ_l W_lᵀ dy_l + D ∘ (A_lᵀ dS_l)
    dA_l = dS_l (x ∘ D)ᵀ,   dB_l = s_l · dy_l S_lᵀ

All products are added before they are rounded; x and each dy are read (and widened, where products are taken in fp32)
once, W and b get no gradients, and beside x only S is kept. Rows may belong to segments with changes of their own, or
with none: what is frozen is multiplied for all rows at once. The A of all layers are one matrix for each segment. D is
the one that ``F.dropout`` would draw, drawn again in backward; with dropout a layer comes alone, for one segment, since
each draws its own masks. The twin is the frozen layers with ``F.linear(F.linear(F.dropout(x), A), s · B)`` beside them.

Legend: N rows, I inputs, O outputs of a layer, R rank of a layer, Q the sum of all ranks of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kernels import products

Inside = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen linear layer: its weight, or what makes it dense in a dtype, and its bias."""

    weight: Tensor | Callable[[torch.dtype], Tensor]
    bias_O: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a frozen layer: ``scale`` · B A of an x of which ``share`` is dropped, by the numbers of what
    ``draw`` gives, or of torch's own generator."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    share: float = 0.0
    draw: Callable[[], torch.Generator | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Changed:
    """A layer with its change in each segment; what the layer itself takes happens ``inside``."""

    layer: Frozen
    changes: Sequence[Change | None]
    inside: Inside = nullcontext


def changed_linear(
    x: Tensor, *layers: Changed, counts: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """What each of the layers, with its changes, makes of x. Dropout is on a CPU alone.

    ``counts`` are the rows of the segments, one after the other along the flattened rows of x; by default all are one.
    """
    counts = (x.shape[:-1].numel(),) if counts is None else counts
    share = max(c.share for layer in layers for c in layer.changes if c is not None)
    if share and (len(layers) > 1 or len(counts) > 1):
        raise ValueError("layers with dropout are computed one by one: each draws its own masks")
    bounds = tuple(pairwise((0, *accumulate(counts))))
    generator = _generator(layers) if share else torch.default_generator
    how = _How(layers, bounds, share, generator, generator.get_state() if share else None)
    tensors: list[Tensor | None] = []
    for layer in layers:
        weight = layer.layer.weight
        tensors.append(weight if isinstance(weight, Tensor) else None)
    for change in how.changes:
        tensors += change.a_RI, change.b_OR
    found: tuple[Tensor, ...] = _Changed.apply(x, how, *tensors)  # type: ignore[no-untyped-call]
    return found


def _generator(layers: Sequence[Changed]) -> torch.Generator:
    """That of the one change there is, with dropout."""
    (change,) = layers[0].changes
    drawn = None if change is None else change.draw()
    return torch.default_generator if drawn is None else drawn


@dataclass(frozen=True, slots=True)
class _How:
    layers: Sequence[Changed]
    bounds: Sequence[tuple[int, int]]
    """Where each segment begins and ends."""
    share: float
    generator: torch.Generator
    state: Tensor | None
    """Of the generator, before the masks are drawn."""

    @property
    def changes(self) -> list[Change]:
        """All there are, segment by segment."""
        each = zip(*(layer.changes for layer in self.layers), strict=True)
        return [change for change in chain(*each) if change is not None]

    def masks(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """D, of the generator that is given, or else as it was drawn before."""
        if generator is None and self.state is not None:
            generator = torch.Generator()
            generator.set_state(self.state)
        keeps = 1 - self.share
        return torch.empty_like(x).bernoulli_(keeps, generator=generator).div_(keeps)


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the layers."""

    held: Tensor | None
    how: Changed

    def weight(self, dtype: torch.dtype) -> Tensor:
        if self.held is not None:
            return self.held
        make = self.how.layer.weight
        assert not isinstance(make, Tensor)
        return make(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        bias_O = self.how.layer.bias_O
        return None if bias_O is None else bias_O.to(dtype)


class _Segment:
    """Some rows with the factors of their changes, by the layer that each changes."""

    __slots__ = ("a_QI", "b_ORs", "ranks", "scales", "start", "stop", "whose")

    def __init__(
        self, start: int, stop: int, changes: Sequence[tuple[int, float, Tensor, Tensor]]
    ) -> None:
        self.start, self.stop = start, stop
        self.whose = [place for place, _, _, _ in changes]
        self.scales = [scale for _, scale, _, _ in changes]
        self.ranks = [len(a) for _, _, a, _ in changes]
        self.a_QI = _joined([a for _, _, a, _ in changes])
        self.b_ORs = [b for _, _, _, b in changes]

    def within(self, rows: slice) -> tuple[slice, slice] | None:
        """Its rows among some: counted from the first of those, and from its own first."""
        first, last = max(self.start, rows.start), min(self.stop, rows.stop)
        if first >= last and self.stop > self.start:
            return None
        return slice(first - rows.start, last - rows.start), slice(
            first - self.start, last - self.start
        )

    def of_each(self, x_NQ: Tensor) -> Iterator[tuple[int, int, float, Tensor, Tensor]]:
        """For each change its number, its layer, its scale, its B, and what of x is its own."""
        split = x_NQ.split(self.ranks, dim=1)
        return zip(range(len(split)), self.whose, self.scales, self.b_ORs, split, strict=True)


def _taken(
    how: _How, tensors: Sequence[Any], dtype: torch.dtype
) -> tuple[list[_Part], list[_Segment]]:
    """The layers, and the segments that have changes, with factors in a dtype."""
    count = len(how.layers)
    parts = [_Part(held, layer) for held, layer in zip(tensors[:count], how.layers, strict=True)]
    factors, segments = iter(tensors[count:]), []
    for number, (start, stop) in enumerate(how.bounds):
        found = []
        for place, layer in enumerate(how.layers):
            change = layer.changes[number]
            if change is not None:
                a_RI, b_OR = next(factors).to(dtype), next(factors).to(dtype)
                found.append((place, change.scale, a_RI, b_OR))
        if found:
            segments.append(_Segment(start, stop, found))
    return parts, segments


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: _How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with products.no_autocast(x):
            found, inner = _forward(x, how, tensors)
        ctx.save_for_backward(x, *inner, *tensors)
        ctx.how, ctx.inner = how, len(inner)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        inner, tensors = saved[: ctx.inner], saved[ctx.inner :]
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            given = [t for t, want in zip((x, None, *tensors), wanted, strict=True) if want]
            found = _plainly(x, ctx.how, tensors)
            grads = iter(torch.autograd.grad(found, given, outer, create_graph=True))
            return tuple(next(grads) if want else None for want in wanted)
        with products.no_autocast(x):
            dx, factors = _backward(outer, x, inner, ctx.how, tensors, into_x=wanted[0])
        return dx, None, *(None for _ in ctx.how.layers), *factors


def _forward(
    x: Tensor, how: _How, tensors: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Every y, and the S of every segment."""
    wide = products.widens(x)
    parts, segments = _taken(how, tensors, torch.float32 if wide else x.dtype)
    flat = given = x.reshape(-1, x.shape[-1])
    if how.share:
        given = (x * how.masks(x, how.generator)).reshape(flat.shape)
    kept = [x.new_empty(s.stop - s.start, len(s.a_QI)) for s in segments]
    found: list[Tensor] = []
    for rows in _slices(len(flat), whole=not wide):
        x_NI, given_NI = flat[rows], given[rows]
        if wide:
            x_NI = products.scratch("x", *x_NI.shape).copy_(x_NI)
            given_NI = products.scratch("d", *x_NI.shape).copy_(given_NI) if how.share else x_NI
        additions: list[list[tuple[slice, Tensor, Tensor, float]]] = [[] for _ in parts]
        for segment, kept_NQ in zip(segments, kept, strict=True):
            if (places := segment.within(rows)) is None:
                continue
            here, own = places
            new_NQ = given_NI[here] @ segment.a_QI.T
            kept_NQ[own] = new_NQ
            for _, place, scale, b_OR, new_NR in segment.of_each(new_NQ):
                additions[place].append((here, new_NR, b_OR, scale))
        for place, part in enumerate(parts):
            with part.how.inside():
                y_NO = _product(x_NI, part, x.dtype, wide)
            for here, new_NR, b_OR, scale in additions[place]:
                y_NO[here].addmm_(new_NR, b_OR.T, alpha=scale)
            if not wide:
                found.append(y_NO)
                continue
            if len(found) == place:
                found.append(x.new_empty(len(flat), y_NO.shape[1]))
            found[place][rows] = y_NO
    # no views, which autograd would forbid to be written in place
    shaped = [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in found]
    return shaped, kept


def _product(x_NI: Tensor, part: _Part, dtype: torch.dtype, wide: bool) -> Tensor:
    """The frozen layer alone."""
    weight, bias = part.weight(dtype), part.bias(dtype)
    if not wide:
        return F.linear(x_NI, weight, bias)
    room = products.scratch("y", len(x_NI), len(weight))
    return products.wide_linear(x_NI, products.widened(weight), bias, room)


def _backward(
    outer: Sequence[Tensor],
    x: Tensor,
    inner: Sequence[Tensor],
    how: _How,
    tensors: Sequence[Tensor | None],
    *,
    into_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (where it is wanted), and dA and dB of each change, segment by segment."""
    wide = products.widens(x)
    parts, segments = _taken(how, tensors, torch.float32 if wide else x.dtype)
    das = [torch.zeros_like(segment.a_QI) for segment in segments]
    dbs = [[b.new_zeros(b.shape[::-1]) for b in segment.b_ORs] for segment in segments]
    masks = how.masks(x) if how.share else None
    given = (x if masks is None else x * masks).reshape(-1, x.shape[-1])
    dx = x.new_empty(given.shape) if into_x and wide else None
    beside = torch.empty_like(given) if into_x and masks is not None else None
    grads = [grad.reshape(-1, grad.shape[-1]) for grad in outer]
    for rows in _slices(len(given), whole=not wide):
        slopes: list[list[Tensor]] = [[] for _ in segments]
        part_NI = None
        for place, (part, grad) in enumerate(zip(parts, grads, strict=True)):
            grad_NO = grad[rows]
            if wide:
                grad_NO = products.scratch("g", *grad_NO.shape).copy_(grad_NO)
            for segment, kept_NQ, db, found in zip(segments, inner, dbs, slopes, strict=True):
                found += _slopes(grad_NO, place, segment, rows, kept_NQ, db)
            if into_x:
                with part.how.inside():
                    part_NI = _times(grad_NO, part, x.dtype, wide, part_NI)
        given_NI = given[rows]
        if wide:
            given_NI = products.scratch("g", *given_NI.shape).copy_(given_NI)
        for segment, da_QI, found in zip(segments, das, slopes, strict=True):
            if (places := segment.within(rows)) is None:
                continue
            slopes_NQ, here = _joined(found, dim=1), places[0]
            da_QI.addmm_(slopes_NQ.T, given_NI[here])
            if part_NI is None:
                continue
            if beside is not None:
                beside[rows][here] = slopes_NQ @ segment.a_QI
            else:
                part_NI[here].addmm_(slopes_NQ, segment.a_QI)
        if part_NI is None:
            continue
        if dx is None:
            dx = part_NI
        else:
            dx[rows] = part_NI
    if dx is not None:
        if beside is not None and masks is not None:
            dx += beside.mul_(masks.reshape(beside.shape))
        dx = dx.view(x.shape)
    factors: list[Tensor] = []
    for segment, da_QI, db in zip(segments, das, dbs, strict=True):
        each = zip(da_QI.split(segment.ranks), db, segment.scales, strict=True)
        factors += chain(*((da, d.T.mul(scale)) for da, d, scale in each))
    own = tensors[len(parts) :]
    return dx, [d.to(t.dtype) for d, t in zip(factors, own, strict=True) if t is not None]


def _slopes(
    grad_NO: Tensor,
    place: int,
    segment: _Segment,
    rows: slice,
    kept_NQ: Tensor,
    dbs: Sequence[Tensor],
) -> Iterator[Tensor]:
    """dS of a segment's change of one layer, if there is one; dB on the way (transposed, and not scaled)."""
    if (places := segment.within(rows)) is None:
        return
    here, own = places
    for number, whose, scale, b_OR, kept_NR in segment.of_each(kept_NQ[own]):
        if whose == place:
            dbs[number].addmm_(kept_NR.to(b_OR.dtype).T, grad_NO[here])
            yield (grad_NO[here] @ b_OR).mul_(scale)


def _times(
    grad_NO: Tensor, part: _Part, dtype: torch.dtype, wide: bool, more: Tensor | None
) -> Tensor:
    """Wᵀ dy of the frozen layer alone, added to what there is ``more``."""
    weight = part.weight(dtype)
    if not wide:
        return grad_NO @ weight if more is None else more.addmm_(grad_NO, weight)
    room = products.scratch("x", len(grad_NO), weight.shape[1])
    weight = products.widened(weight)
    return products.wide_times(grad_NO, weight, room, add=more is not None)


def _plainly(x: Tensor, how: _How, tensors: Sequence[Any]) -> list[Tensor]:
    """By operations that have derivatives of any order."""
    parts, segments = _taken(how, tensors, x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    given = (x * how.masks(x)).reshape(flat.shape) if how.share else flat
    found = [F.linear(flat, part.weight(x.dtype), part.bias(x.dtype)) for part in parts]
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        for _, place, scale, b_OR, new_NR in segment.of_each(F.linear(given[rows], segment.a_QI)):
            change = F.pad(
                F.linear(new_NR, b_OR * scale), (0, 0, rows.start, len(flat) - rows.stop)
            )
            found[place] = found[place] + change
    return [y.view(*x.shape[:-1], -1) for y in found]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _slices(count: int, *, whole: bool) -> Iterator[slice]:
    """Such rows as are widened at a time; a slice of nothing where there are none."""
    step = max(count, 1) if whole else products.ROWS
    return (slice(start, min(start + step, count)) for start in range(0, max(count, 1), step))
