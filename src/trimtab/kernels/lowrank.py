"""A frozen linear layer and a low-rank change of it as one operation.

    y = W x + b + s · B A (x ∘ D),   D is dropout
    S = A (x ∘ D),   dS = s · Bᵀ dy,   dx = Wᵀ dy + D ∘ (Aᵀ dS),   dA = dS (x ∘ D)ᵀ,   dB = s · dy Sᵀ

Both products are added before they are rounded, x and dy are read (and widened, where products are taken in fp32) once
for all of them, W and b get no gradients, and beside x only S is kept. D is the one that
``F.dropout`` would draw, drawn again in backward. The twin is the frozen layer with ``F.linear(F.linear(F.dropout(x),
A), s · B)`` beside it.

Legend: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kernels import products

Weight = Tensor | Callable[[torch.dtype], Tensor]
"""A frozen weight, or what makes it dense in a dtype."""
Inside = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a frozen layer: ``scale`` · B A of an x of which ``share`` is dropped."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    share: float = 0.0


def changed_linear(
    x: Tensor, weight: Weight, bias_O: Tensor | None, change: Change, inside: Inside = nullcontext
) -> Tensor:
    """The layer with its change; what the layer itself takes happens ``inside``. Dropout is on a CPU alone."""
    state = torch.get_rng_state() if change.share else None
    source = weight if isinstance(weight, Tensor) else None
    made = None if isinstance(weight, Tensor) else weight
    how = _How(made, bias_O, change.scale, change.share, state, inside)
    y: Tensor = _Changed.apply(x, source, change.a_RI, change.b_OR, how)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True, slots=True)
class _How:
    make: Callable[[torch.dtype], Tensor] | None
    bias_O: Tensor | None
    scale: float
    share: float
    state: Tensor | None
    """Of torch's generator, before the masks are drawn."""
    inside: Inside

    def weight(self, given: Tensor | None, dtype: torch.dtype) -> Tensor:
        if given is not None:
            return given
        assert self.make is not None
        return self.make(dtype)

    def masks(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """D, of the generator that is given, or else as it was drawn before."""
        if generator is None and self.state is not None:
            generator = torch.Generator()
            generator.set_state(self.state)
        keeps = 1 - self.share
        return torch.empty_like(x).bernoulli_(keeps, generator=generator).div_(keeps)


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor | None, a_RI: Tensor, b_OR: Tensor, how: _How
    ) -> Tensor:
        with products.no_autocast(x):
            y, inner_NR = _forward(x, weight_OI, a_RI, b_OR, how)
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR, inner_NR)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR, inner_NR = ctx.saved_tensors
        how: _How = ctx.how
        wanted = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            y = _plainly(x, weight_OI, a_RI, b_OR, how)
            given = [t for t, want in zip((x, a_RI, b_OR), wanted, strict=True) if want]
            found = iter(torch.autograd.grad(y, given, outer, create_graph=True))
            dx, da, db = (next(found) if want else None for want in wanted)
            return dx, None, da, db, None
        with products.no_autocast(x):
            weight = how.weight(weight_OI, x.dtype) if wanted[0] else None
            dx, da, db = _backward(outer[0], x, weight, a_RI, b_OR, inner_NR, how)
        return dx, None, da, db, None


def _forward(
    x: Tensor, weight_OI: Tensor | None, a_RI: Tensor, b_OR: Tensor, how: _How
) -> tuple[Tensor, Tensor]:
    """y, and S."""
    wide = products.widens(x)
    a, b = (t.to(torch.float32 if wide else x.dtype) for t in (a_RI, b_OR))
    flat, weight = x.reshape(-1, x.shape[-1]), how.weight(weight_OI, x.dtype)
    entering = flat
    if how.share:
        entering = (x * how.masks(x, torch.default_generator)).reshape(flat.shape)
    bias = None if how.bias_O is None else how.bias_O.to(x.dtype)
    if wide:
        weight = products.widened(weight)
        y, inner_NR = x.new_empty(len(flat), len(weight)), x.new_empty(len(flat), len(a))
        for x_NI, given_NI, y_NO, kept_NR in _rows(flat, entering, y, inner_NR):
            some = products.scratch("x", *x_NI.shape).copy_(x_NI)
            with how.inside():
                part = products.wide_linear(some, weight, bias, products.scratch("y", *y_NO.shape))
            inner = (some.copy_(given_NI) if how.share else some) @ a.T
            y_NO.copy_(part.addmm_(inner, b.T, alpha=how.scale))
            kept_NR.copy_(inner)
    else:
        with how.inside():
            y = F.linear(flat, weight, bias)
        inner_NR = entering @ a.T
        y.addmm_(inner_NR, b.T, alpha=how.scale)
    # no view, which autograd would forbid to be written in place
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])), inner_NR


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    inner_NR: Tensor,
    how: _How,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (where there is a weight), dA and dB."""
    wide = products.widens(x)
    a, b = (t.to(torch.float32 if wide else x.dtype) for t in (a_RI, b_OR))
    da, db = torch.zeros_like(a), torch.zeros_like(b.T, memory_format=torch.contiguous_format)
    masks = how.masks(x) if how.share else None
    given = (x if masks is None else x * masks).reshape(-1, x.shape[-1])
    dx = x.new_empty(given.shape)
    beside = dx if masks is None else torch.empty_like(dx)
    weight = products.widened(weight) if wide and weight is not None else weight
    rows = _rows(grad.reshape(-1, grad.shape[-1]), given, inner_NR, dx, beside, whole=not wide)
    for grad_NO, given_NI, kept_NR, dx_NI, beside_NI in rows:
        if wide:
            grad_NO = products.scratch("g", *grad_NO.shape).copy_(grad_NO)
            given_NI = products.scratch("x", *given_NI.shape).copy_(given_NI)
        slopes_NR = (grad_NO @ b).mul_(how.scale)
        db.addmm_(kept_NR.to(b.dtype).T, grad_NO)
        da.addmm_(slopes_NR.T, given_NI)
        if weight is None:
            continue
        with how.inside():
            part = products.wide_times(grad_NO, weight, given_NI) if wide else grad_NO @ weight
        if masks is not None:
            beside_NI.copy_(slopes_NR @ a)
        else:
            part.addmm_(slopes_NR, a)
        if wide:
            dx_NI.copy_(part)
        else:
            dx = part
    if masks is not None and weight is not None:
        dx += beside.mul_(masks.reshape(beside.shape))
    db = db.T.mul(how.scale).to(b_OR.dtype)
    return None if weight is None else dx.view(x.shape), da.to(a_RI.dtype), db


def _plainly(x: Tensor, weight_OI: Tensor | None, a_RI: Tensor, b_OR: Tensor, how: _How) -> Tensor:
    """By operations that have derivatives of any order."""
    bias = None if how.bias_O is None else how.bias_O.to(x.dtype)
    y = F.linear(x, how.weight(weight_OI, x.dtype), bias)
    given = x * how.masks(x) if how.share else x
    return y + F.linear(F.linear(given, a_RI.to(x.dtype)), b_OR.to(x.dtype) * how.scale)


def _rows(*tensors: Tensor, whole: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """The tensors by so many rows as are widened at a time."""
    if whole:
        return iter([tensors])
    return zip(*(tensor.split(products.ROWS) for tensor in tensors), strict=True)
