"""The output of a frozen layer with each channel stretched by what is trained.

    z = y + c ∘ (y − b),   dy = (1 + c) ∘ dz,   dc = Σ_n (y − b) ∘ dz

On a CPU by blocks of rows that lie in a core's cache, in fp32 and rounded once; elsewhere by torch's operations, which
are its twin. c is how far a factor is from one: in a narrow dtype it has digits there that the factor would have lost.

Legend: N rows, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.frozen_blocks import FLOATS, PLAIN, by_rows
from trimtab.kernels.tracing import traced


def stretched(y: Tensor, change_C: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """z, of channels along the last axis (or as ``change`` is shaped, where it has more axes)."""
    known = type(y) in PLAIN and y.device.type == "cpu" and y.dtype in FLOATS
    if not known or change_C.dim() != 1 or traced():
        return _plainly(y, change_C, bias_C)
    z: Tensor = _Stretched.apply(y, change_C, bias_C)  # type: ignore[no-untyped-call]
    return z


def _plainly(y: Tensor, change_C: Tensor, bias_C: Tensor | None) -> Tensor:
    moved = y if bias_C is None else y - bias_C.to(y.dtype)
    return torch.addcmul(y, moved, change_C.to(y.dtype))


def _moved(y_NC: Tensor, bias_C: Tensor | None) -> Tensor:
    wide_NC = y_NC.float()
    return wide_NC if bias_C is None else wide_NC - bias_C


class _Stretched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, change_C: Tensor, bias_C: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, change_C, bias_C)
        z, wide_C = torch.empty_like(y, memory_format=torch.contiguous_format), change_C.float()
        for y_NC, z_NC in by_rows(y, z):
            z_NC.copy_(torch.addcmul(y_NC.float(), _moved(y_NC, bias_C), wide_C))
        return z

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        y, change_C, bias_C = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            z = _plainly(y, change_C, bias_C)
            given = [t for t, want in zip((y, change_C), wanted, strict=True) if want]
            found = iter(torch.autograd.grad(z, given, outer, create_graph=True))
            return *(next(found) if want else None for want in wanted), None
        (grad,) = outer
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
        dc, factor_C = torch.zeros_like(change_C, dtype=torch.float32), 1 + change_C.float()
        for y_NC, grad_NC, dy_NC in by_rows(y, grad, dy):
            wide_NC = grad_NC.float()
            dc += (_moved(y_NC, bias_C) * wide_NC).sum(0)
            dy_NC.copy_(wide_NC * factor_C)
        return dy, dc.to(change_C.dtype), None
