"""A sparse linear map given by coordinates, without its dense matrix.

    y_NO = x_NI Sᵀ,   S_OI has values_K at (row, column) = indices_2K; values of one place add up

Backward gives the gradient of the K values alone. Where they are very few, it sums products of gathered columns;
else it takes them out of blocks of rows of the dense gradient, one after the other. Either way in chunks.
`sparse_linear_reference` is the twin: it scatters into a dense matrix.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 22
"""Products held at a time for the gradient of the values."""
SPARSE = 256
"""From one value in so many places on, the gradient of each is computed by itself, and not by blocks of rows."""


def sparse_linear(x: Tensor, indices: Tensor, values: Tensor, out_features: int) -> Tensor:
    """``x Sᵀ`` for x of shape (..., I); differentiable in x and the values."""
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _multiply(flat, indices, values, out_features)
    return y.reshape(*x.shape[:-1], out_features)


def sparse_linear_reference(
    x: Tensor, indices: Tensor, values: Tensor, out_features: int
) -> Tensor:
    """The twin of `sparse_linear`."""
    return F.linear(x, scattered(indices, values, (out_features, x.shape[-1])))


def scattered(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense matrix S."""
    rows, columns = indices.long()
    return values.new_zeros(shape).index_put((rows, columns), values, accumulate=True)


@torch.library.custom_op("trimtab::sparse_linear", mutates_args=())
def _multiply(x: Tensor, indices: Tensor, values: Tensor, out_features: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # torch's sparse products know no half types
    shape = (out_features, x.shape[1])
    matrix = torch.sparse_coo_tensor(
        indices.long(), values.to(wide), shape, check_invariants=False, is_coalesced=False
    )
    y: Tensor = torch.sparse.mm(matrix, x.to(wide).T.contiguous()).T.to(x.dtype)
    return y.contiguous()


@torch.library.custom_op("trimtab::sparse_linear_values", mutates_args=())
def _gradient_of_values(x: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    """For each place (o, i): Σ_n gradient_no · x_ni."""
    rows, columns = indices.long()
    out, width, count = gradient.shape[1], x.shape[1], rows.shape[0]
    found = gradient.new_empty(count)
    gradient_ON = gradient.T.contiguous()
    if count * SPARSE < out * width:
        x_IN, size = x.T.contiguous(), max(CHUNK // max(x.shape[0], 1), 1)
        for start in range(0, count, size):
            part = slice(start, start + size)
            found[part] = (gradient_ON[rows[part]] * x_IN[columns[part]]).sum(1)
        return found
    rows, order = rows.sort()
    block = max(CHUNK // max(width, 1), 1)
    starts = torch.arange(0, out + block, block, device=rows.device)
    bounds = torch.searchsorted(rows, starts).tolist()
    for number, (low, high) in enumerate(pairwise(bounds)):
        first = number * block
        dense = gradient_ON[first : first + block] @ x
        found[order[low:high]] = dense[rows[low:high] - first, columns[order[low:high]]]
    return found


@_multiply.register_fake
def _(x: Tensor, indices: Tensor, values: Tensor, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@_gradient_of_values.register_fake
def _(x: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    return gradient.new_empty(indices.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, values, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, indices, values)
    ctx.in_features = x.shape[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    x, indices, values = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_x = _multiply(gradient, indices.flip(0), values, ctx.in_features)
    of_values = None if x is None else _gradient_of_values(x, indices, gradient).to(values.dtype)
    return of_x if ctx.needs_input_grad[0] else None, None, of_values, None


_multiply.register_autograd(_backward, setup_context=_remember)
