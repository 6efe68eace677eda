"""Frozen linear layers that read the same x, and low-rank changes of them, as one operation.

    y_l = W_l x + b_l + s_l · B_l A_l (x ∘ D),   D is dropout
    S_l = A_l (x ∘ D),   dS_l = s_l · B_lᵀ dy_l,   dx = Σ_l W_lᵀ dy_l + D ∘ (A_lᵀ dS_l)
    dA_l = dS_l (x ∘ D)ᵀ,   dB_l = s_l · dy_l S_lᵀ

All products are added before they are rounded; x and each dy are read (and widened, where products are taken in fp32)
once, the A of all layers are one matrix, W and b get no gradients, and beside x only S is kept. D is the one that
``F.dropout`` would draw, drawn again in backward; layers with dropout come alone, since each draws its own. The twin is
the frozen layers with ``F.linear(F.linear(F.dropout(x), A), s · B)`` beside them.

Legend: N rows, I inputs, O outputs of a layer, R rank of a layer, Q the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
    """What is added to a frozen layer: ``scale`` · B A of an x of which ``share`` is dropped."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Changed:
    """A layer with its change; what the layer itself takes happens ``inside``."""

    layer: Frozen
    change: Change
    inside: Inside = nullcontext


def changed_linear(x: Tensor, *layers: Changed) -> tuple[Tensor, ...]:
    """What each of the layers, with its change, makes of x. Dropout is on a CPU alone, and of a layer alone."""
    share = max(layer.change.share for layer in layers)
    if share and len(layers) > 1:
        raise ValueError("layers with dropout are computed one by one: each draws its own masks")
    how = _How(layers, share, torch.get_rng_state() if share else None)
    tensors: list[Tensor | None] = []
    for layer in layers:
        weight = layer.layer.weight
        held = weight if isinstance(weight, Tensor) else None
        tensors += held, layer.change.a_RI, layer.change.b_OR
    found: tuple[Tensor, ...] = _Changed.apply(x, how, *tensors)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True, slots=True)
class _How:
    layers: Sequence[Changed]
    share: float
    state: Tensor | None
    """Of torch's generator, before the masks are drawn."""

    def masks(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """D, of the generator that is given, or else as it was drawn before."""
        if generator is None and self.state is not None:
            generator = torch.Generator()
            generator.set_state(self.state)
        keeps = 1 - self.share
        return torch.empty_like(x).bernoulli_(keeps, generator=generator).div_(keeps)


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the layers, with its tensors as a pass over rows takes them."""

    held: Tensor | None
    a_RI: Tensor
    b_OR: Tensor
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

    @property
    def scale(self) -> float:
        return self.how.change.scale


def _parts(how: _How, tensors: Sequence[Any], dtype: torch.dtype) -> list[_Part]:
    """The layers, with factors in a dtype."""
    each = zip(tensors[::3], tensors[1::3], tensors[2::3], how.layers, strict=True)
    return [_Part(held, a.to(dtype), b.to(dtype), layer) for held, a, b, layer in each]


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: _How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with products.no_autocast(x):
            found, inner_NQ = _forward(x, how, tensors)
        ctx.save_for_backward(x, inner_NQ, *tensors)
        ctx.how = how
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, inner_NQ, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            given = [t for t, want in zip((x, None, *tensors), wanted, strict=True) if want]
            found = _plainly(x, ctx.how, tensors)
            grads = iter(torch.autograd.grad(found, given, outer, create_graph=True))
            return tuple(next(grads) if want else None for want in wanted)
        with products.no_autocast(x):
            dx, factors = _backward(outer, x, inner_NQ, ctx.how, tensors, into_x=wanted[0])
        return dx, None, *(grad for da, db in factors for grad in (None, da, db))


def _forward(x: Tensor, how: _How, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
    """Every y, and every S side by side."""
    wide = products.widens(x)
    parts = _parts(how, tensors, torch.float32 if wide else x.dtype)
    a_QI = _joined([part.a_RI for part in parts])
    flat = given = x.reshape(-1, x.shape[-1])
    if how.share:
        given = (x * how.masks(x, torch.default_generator)).reshape(flat.shape)
    inner_NQ = x.new_empty(len(flat), len(a_QI))
    found = [x.new_empty(len(flat), len(part.b_OR)) for part in parts] if wide else []
    for rows in _slices(len(flat), whole=not wide):
        x_NI, given_NI = flat[rows], given[rows]
        if wide:
            x_NI = products.scratch("x", *x_NI.shape).copy_(x_NI)
            given_NI = products.scratch("d", *x_NI.shape).copy_(given_NI) if how.share else x_NI
        new_NQ = given_NI @ a_QI.T
        inner_NQ[rows] = new_NQ
        for place, (part, new_NR) in enumerate(zip(parts, _of_each(new_NQ, parts), strict=True)):
            with part.how.inside():
                y_NO = _product(x_NI, part, x.dtype, wide)
            y_NO.addmm_(new_NR, part.b_OR.T, alpha=part.scale)
            if wide:
                found[place][rows] = y_NO
            else:
                found.append(y_NO)
    # no views, which autograd would forbid to be written in place
    shaped = [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in found]
    return shaped, inner_NQ


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
    inner_NQ: Tensor,
    how: _How,
    tensors: Sequence[Tensor | None],
    *,
    into_x: bool,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """dx (where it is wanted), and each dA and dB."""
    wide = products.widens(x)
    parts = _parts(how, tensors, torch.float32 if wide else x.dtype)
    a_QI = _joined([part.a_RI for part in parts])
    da_QI = torch.zeros_like(a_QI)
    dbs = [part.b_OR.new_zeros(part.b_OR.shape[::-1]) for part in parts]
    masks = how.masks(x) if how.share else None
    given = (x if masks is None else x * masks).reshape(-1, x.shape[-1])
    dx = x.new_empty(given.shape) if into_x and wide else None
    beside = torch.empty_like(given) if into_x and masks is not None else None
    grads = [grad.reshape(-1, grad.shape[-1]) for grad in outer]
    for rows in _slices(len(given), whole=not wide):
        kept = _of_each(inner_NQ[rows], parts)
        slopes, part_NI = [], None
        for part, grad, kept_NR, db in zip(parts, grads, kept, dbs, strict=True):
            grad_NO = grad[rows]
            if wide:
                grad_NO = products.scratch("g", *grad_NO.shape).copy_(grad_NO)
            slopes.append((grad_NO @ part.b_OR).mul_(part.scale))
            db.addmm_(kept_NR.to(db.dtype).T, grad_NO)
            if into_x:
                with part.how.inside():
                    part_NI = _times(grad_NO, part, x.dtype, wide, part_NI)
        slopes_NQ, given_NI = _joined(slopes, dim=1), given[rows]
        if wide:
            given_NI = products.scratch("g", *given_NI.shape).copy_(given_NI)
        da_QI.addmm_(slopes_NQ.T, given_NI)
        if part_NI is None:
            continue
        if beside is not None:
            beside[rows] = slopes_NQ @ a_QI
        else:
            part_NI.addmm_(slopes_NQ, a_QI)
        if dx is None:
            dx = part_NI
        else:
            dx[rows] = part_NI
    if dx is not None:
        if beside is not None and masks is not None:
            dx += beside.mul_(masks.reshape(beside.shape))
        dx = dx.view(x.shape)
    das = da_QI.split([len(part.a_RI) for part in parts])
    factors = [
        (da.to(a.dtype), db.T.mul(part.scale).to(b.dtype))
        for da, db, part, a, b in zip(das, dbs, parts, tensors[1::3], tensors[2::3], strict=True)
        if a is not None and b is not None
    ]
    return dx, factors


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
    given = x * how.masks(x) if how.share else x
    return [
        F.linear(x, part.weight(x.dtype), part.bias(x.dtype))
        + F.linear(F.linear(given, part.a_RI), part.b_OR * part.scale)
        for part in _parts(how, tensors, x.dtype)
    ]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _of_each(x_NQ: Tensor, parts: Sequence[_Part]) -> Sequence[Tensor]:
    """What belongs to each layer."""
    return x_NQ.split([len(part.a_RI) for part in parts], dim=1)


def _slices(count: int, *, whole: bool) -> Iterator[slice]:
    """Such rows as are widened at a time; a slice of nothing where there are none."""
    step = max(count, 1) if whole else products.ROWS
    return (slice(start, start + step) for start in range(0, max(count, 1), step))
