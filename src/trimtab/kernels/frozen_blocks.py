"""What lies between the layers of a block and is frozen, keeping little for backward: norms and gated products.

    RMS norm        y = w ∘ x̂,   x̂ = x / √(mean x² + ε)       (w is 1 + the weight in some families)
                    dx = (a − x̂ · mean(a ∘ x̂)) / √(mean x² + ε),   a = w ∘ dy;   w is frozen and gets no gradient
    gated product   y = φ(g) ∘ u,   du = φ(g) ∘ dy,   dg = φ'(g) ∘ u ∘ dy

On a CPU both go by blocks of rows that lie in a core's cache, and forwards are, bit for bit, those of the families' own
code. On CUDA each is one kernel (`trimtab.kernels.fused_blocks`), within a rounding of that; where there is none, it is
torch's operations on all rows at once. A norm keeps x, a gated product g and u; what comes out is not kept even where a
later layer needs it, if it is remade (`trimtab.kernels.remade`).

Legend: N rows, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.kernels.accelerators import triton_for
from trimtab.kernels.activations import kind_of
from trimtab.kernels.remade import remade

BLOCK = 1 << 17
"""Elements of a block of rows."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Of what the kernels take: they compute in fp32."""
PLAIN = (Tensor, nn.Parameter)
"""Whose values are what they look like: no shards, no values in another form."""
WIDEST = 1 << 14
"""Elements of a row that a norm of theirs holds, at most."""

Rounding = Literal["before", "after", "offset"]
"""Whether x̂ is rounded before or after it is multiplied by the weight; or after, by 1 + the weight (an offset)."""
Activation = Callable[[Tensor], Tensor]


def rms_norm(x: Tensor, weight_C: Tensor, epsilon: float, rounding: Rounding) -> Tensor:
    """Of the last axis of x (float or narrower), with a frozen weight."""
    y: Tensor = _RmsNorm.apply(x, weight_C, epsilon, rounding)  # type: ignore[no-untyped-call]
    return remade(y, _normed, x, weight_C, epsilon, rounding)


def gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up``, of an activation that acts on each element by itself and has no parameters."""
    y: Tensor = _GatedProduct.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return remade(y, _gated, gate, up, activation)


def activated(x: Tensor, activation: Activation) -> Tensor:
    """``activation(x)``, of such an activation."""
    return remade(activation(x), activation, x)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor, epsilon: float, rounding: Rounding
    ) -> Tensor:
        ctx.save_for_backward(x, weight_C)
        ctx.epsilon, ctx.rounding = epsilon, rounding
        return _normed(x, weight_C, epsilon, rounding)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C = ctx.saved_tensors
        (grad,) = outer
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            y = _plainly_normed(x, weight_C, ctx.epsilon, ctx.rounding)
            return *torch.autograd.grad(y, x, grad, create_graph=True), None, None, None
        if (kernels := _kernels(x, weight_C, grad)) and x.shape[-1] <= WIDEST:
            dx = kernels.rms_norm_grad(x, weight_C, grad, ctx.epsilon, ctx.rounding)
            return dx, None, None, None
        wide_C = weight_C.float() + (1 if ctx.rounding == "offset" else 0)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for x_NC, grad_NC, dx_NC in by_rows(x, grad, dx):
            normal_NC, scale_N1 = _standardised(x_NC, ctx.epsilon)
            slope_NC = grad_NC.float() * wide_C
            mean_N1 = (slope_NC * normal_NC).mean(-1, keepdim=True)
            dx_NC.copy_(slope_NC.addcmul_(normal_NC, mean_N1, value=-1).mul_(scale_N1))
        return dx, None, None, None


def _normed(x: Tensor, weight_C: Tensor, epsilon: float, rounding: Rounding) -> Tensor:
    if (kernels := _kernels(x, weight_C)) and x.shape[-1] <= WIDEST:
        return kernels.rms_norm(x, weight_C, epsilon, rounding)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    offset_C = 1.0 + weight_C.float() if rounding == "offset" else None
    for x_NC, y_NC in by_rows(x, y):
        normal_NC, _ = _standardised(x_NC, epsilon)
        if offset_C is not None:
            y_NC.copy_(normal_NC.mul_(offset_C))
        elif rounding == "after":
            y_NC.copy_(normal_NC.mul_(weight_C))
        else:
            y_NC.copy_(normal_NC).mul_(weight_C)
    return y


def _plainly_normed(x: Tensor, weight_C: Tensor, epsilon: float, rounding: Rounding) -> Tensor:
    """By operations that have derivatives of any order."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if rounding == "before":
        return normal.to(x.dtype) * weight_C
    return (normal * (weight_C if rounding == "after" else 1.0 + weight_C.float())).to(x.dtype)


def _standardised(x_NC: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x̂ in fp32, and what x was multiplied by."""
    wide_NC = x_NC.to(torch.float32, copy=True)
    scale_N1 = torch.rsqrt(wide_NC.pow(2).mean(-1, keepdim=True) + epsilon)
    return wide_NC.mul_(scale_N1), scale_N1


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        (grad,) = outer
        if torch.is_grad_enabled():
            y = ctx.activation(gate) * up
            wanted = [
                t for t, needed in zip((gate, up), ctx.needs_input_grad, strict=False) if needed
            ]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None
        kind = kind_of(ctx.activation)
        if kind is not None and (kernels := _kernels(gate, up, grad)):
            return *kernels.gated_product_grad(gate, up, grad, kind), None
        dgate, dup = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up)
        )
        for gate_NC, up_NC, grad_NC, dgate_NC, dup_NC in by_rows(gate, up, grad, dgate, dup):
            given_NC = gate_NC.detach().requires_grad_()
            with torch.enable_grad():
                active_NC = ctx.activation(given_NC)
            torch.mul(grad_NC, active_NC.detach(), out=dup_NC)
            (found_NC,) = torch.autograd.grad(active_NC, given_NC, grad_NC * up_NC)
            dgate_NC.copy_(found_NC)
        return dgate, dup, None


def _gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    kind = kind_of(activation)
    if kind is not None and (kernels := _kernels(gate, up)):
        return kernels.gated_product(gate, up, kind)
    y = torch.empty_like(up, memory_format=torch.contiguous_format)
    for gate_NC, up_NC, y_NC in by_rows(gate, up, y):
        torch.mul(activation(gate_NC), up_NC, out=y_NC)
    return y


def _kernels(*tensors: Tensor) -> Any:
    """`trimtab.kernels.fused_blocks`, where it takes these: on CUDA, with Triton installed."""
    known = all(type(t) in PLAIN and t.dtype in FLOATS for t in tensors)
    if not known or not triton_for(tensors[0]):
        return None
    from trimtab.kernels import fused_blocks

    return fused_blocks


def by_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, by blocks of rows; elsewhere than on a CPU in one piece."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    rows = max(BLOCK // flat[0].shape[-1], 1) if flat[0].device.type == "cpu" else len(flat[0])
    return zip(*(tensor.split(max(rows, 1)) for tensor in flat), strict=True)
