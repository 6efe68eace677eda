"""Frozen norms and gated products in one pass by Triton: the twins of the plain torch in `frozen_blocks`.

Both compute in fp32 and round where plain torch does. A program takes whole rows of a norm, or a run of a row of a
gated product. Sums over a row are taken in another order than torch's and exponentials are another library's, so that a
value may be the neighbour of torch's; the same tensors give the same bits each time. Products and sums are not
contracted (``enable_fp_fusion=False``).

This module imports Triton; it is imported where there is a CUDA tensor and Triton is installed, and nowhere else.

Legend: N rows, C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Elements of the rows that a program norms, at least."""
RUN = 1024
"""Elements of a row of a gated product that a program makes."""


@triton.jit
def _norm_kernel(
    x, weight, y, rows, width, x_step, epsilon,
    ROUNDING: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    there = (row < rows) & (column < width)
    wide = tl.load(x + row * x_step + column, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / width + epsilon)
    normal = wide * scale
    if ROUNDING == "before":
        normal = normal.to(y.dtype.element_ty).to(tl.float32)
    if ROUNDING == "offset":
        factor = 1.0 + factor
    made = normal * factor
    tl.store(y + row * width + column, made.to(y.dtype.element_ty), mask=there)


@triton.jit
def _norm_grad_kernel(
    x, weight, grad, dx, rows, width, x_step, grad_step, epsilon,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    there = (row < rows) & (column < width)
    wide = tl.load(x + row * x_step + column, mask=there, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * grad_step + column, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if OFFSET:
        factor = factor + 1.0
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / width + epsilon)
    normal = wide * scale
    slope = slope * factor
    mean = tl.sum(slope * normal, axis=1, keep_dims=True) / width
    made = (slope - normal * mean) * scale
    tl.store(dx + row * width + column, made.to(dx.dtype.element_ty), mask=there)


@triton.jit
def _bent(x):
    """2 z, of which the tanh-GELU takes the sigmoid."""
    return 1.5957691216057308 * (x + 0.044715 * (x * x * x))


@triton.jit
def _active(x, KIND: tl.constexpr):
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = x / (1.0 + tl.exp(-_bent(x)))
    return y


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """The derivative of the activation."""
    if KIND == "silu":
        share = 1.0 / (1.0 + tl.exp(-x))
        d = share * (1.0 + x * (1.0 - share))
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        share = 1.0 / (1.0 + tl.exp(-_bent(x)))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * (x * x))
        d = share + x * share * (1.0 - share) * inner
    return d


@triton.jit
def _gated_kernel(
    gate, up, y, width, gate_step, up_step, KIND: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)
    there = column < width
    g = tl.load(gate + row * gate_step + column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=there, other=0.0).to(tl.float32)
    made = _active(g, KIND).to(y.dtype.element_ty).to(tl.float32) * u
    tl.store(y + row * width + column, made.to(y.dtype.element_ty), mask=there)


@triton.jit
def _gated_grad_kernel(
    gate, up, grad, dgate, dup, width, gate_step, up_step, grad_step,
    KIND: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)
    there = column < width
    g = tl.load(gate + row * gate_step + column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=there, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * grad_step + column, mask=there, other=0.0).to(tl.float32)
    beside = _active(g, KIND).to(dup.dtype.element_ty).to(tl.float32) * dy
    outer = (dy * u).to(dgate.dtype.element_ty).to(tl.float32)
    to = row * width + column
    tl.store(dup + to, beside.to(dup.dtype.element_ty), mask=there)
    tl.store(dgate + to, (outer * _slope(g, KIND)).to(dgate.dtype.element_ty), mask=there)


@torch.library.custom_op("trimtab::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight_C: Tensor, epsilon: float, rounding: str) -> Tensor:
    """``rounding`` is that of `trimtab.kernels.frozen_blocks`."""
    y = _like(x)
    if y.numel():
        x_NC = _rows(x)
        grid, sizes = _tiles(x_NC)
        with torch.cuda.device_of(x):
            _norm_kernel[grid](
                x_NC, weight_C.contiguous(), y, *x_NC.shape, x_NC.stride(0), epsilon, rounding,
                **sizes, enable_fp_fusion=False,
            )  # fmt: skip
    return y


@torch.library.custom_op("trimtab::rms_norm_grad", mutates_args=())
def rms_norm_grad(
    x: Tensor, weight_C: Tensor, grad: Tensor, epsilon: float, rounding: str
) -> Tensor:
    """The gradient of x, given that of what comes out."""
    dx = _like(x)
    if dx.numel():
        x_NC, grad_NC = _rows(x), _rows(grad)
        grid, sizes = _tiles(x_NC)
        with torch.cuda.device_of(x):
            _norm_grad_kernel[grid](
                x_NC, weight_C.contiguous(), grad_NC, dx, *x_NC.shape, x_NC.stride(0), grad_NC.stride(0), epsilon,
                rounding == "offset", **sizes, enable_fp_fusion=False,
            )  # fmt: skip
    return dx


@torch.library.custom_op("trimtab::gated_product", mutates_args=())
def gated_product(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``kind`` is that of the activation, of `trimtab.kernels.activations`."""
    y = _like(up)
    if y.numel():
        gate_NC, up_NC = _rows(gate), _rows(up)
        with torch.cuda.device_of(gate):
            _gated_kernel[_runs(gate_NC)](
                gate_NC, up_NC, y, gate_NC.shape[1], gate_NC.stride(0), up_NC.stride(0), kind, RUN,
                enable_fp_fusion=False,
            )  # fmt: skip
    return y


@torch.library.custom_op("trimtab::gated_product_grad", mutates_args=())
def gated_product_grad(gate: Tensor, up: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of both, given that of what comes out."""
    dgate, dup = _like(gate), _like(up)
    if dgate.numel():
        gate_NC, up_NC, grad_NC = _rows(gate), _rows(up), _rows(grad)
        with torch.cuda.device_of(gate):
            _gated_grad_kernel[_runs(gate_NC)](
                gate_NC, up_NC, grad_NC, dgate, dup, gate_NC.shape[1], gate_NC.stride(0), up_NC.stride(0),
                grad_NC.stride(0), kind, RUN, enable_fp_fusion=False,
            )  # fmt: skip
    return dgate, dup


@rms_norm.register_fake
def _(x: Tensor, weight_C: Tensor, epsilon: float, rounding: str) -> Tensor:
    return _like(x)


@rms_norm_grad.register_fake
def _(x: Tensor, weight_C: Tensor, grad: Tensor, epsilon: float, rounding: str) -> Tensor:
    return _like(x)


@gated_product.register_fake
def _(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _like(up)


@gated_product_grad.register_fake
def _(gate: Tensor, up: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return _like(gate), _like(up)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """(N, C), each row in one piece; a view where it can be."""
    x_NC = x.reshape(-1, x.shape[-1])
    return x_NC if x_NC.stride(1) == 1 else x_NC.contiguous()


def _tiles(x_NC: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """How many programs norm these rows, and of which size: some 16 elements a thread."""
    width = triton.next_power_of_2(x_NC.shape[1])
    rows = max(TILE // width, 1)
    warps = min(rows * width // 512, 16)
    return (triton.cdiv(len(x_NC), rows),), {"ROWS": rows, "WIDTH": width, "num_warps": warps}


def _runs(x_NC: Tensor) -> tuple[int, int]:
    return len(x_NC), triton.cdiv(x_NC.shape[1], RUN)
