"""A linear map that keeps of its input, for backward, one number for each group of features (VeLoRA).

    z_tg = x_tg · v,   x̂_tg = scale · z_tg v,   ∂W = gᵀ x̂   instead of   gᵀ x

v has length 1 and the width D of a group; features are padded with zeros to G groups. `compressed_linear` is the map,
`reconstructed` what backward takes for the input, which is the reference: x̂ = reconstructed(x, v, G) · scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_width(features: int, groups: int) -> int:
    """D, so that G groups of it hold all features."""
    return -(-features // groups)


def grouped(x: Tensor, groups: int) -> Tensor:
    """x_..I -> (T, G, D)."""
    width = group_width(x.shape[-1], groups)
    padded = F.pad(x, (0, groups * width - x.shape[-1]))
    return padded.reshape(-1, groups, width)


def mean_direction(x: Tensor, groups: int) -> Tensor:
    """The direction of the mean of all groups of all positions; of equal parts where that is zero. In fp32."""
    mean = grouped(x, groups).flatten(0, 1).mean(0).float()
    norm = torch.linalg.vector_norm(mean)
    even = torch.full_like(mean, mean.numel() ** -0.5)
    return torch.where(norm == 0, even, mean / norm)


def reconstructed(x: Tensor, direction: Tensor, groups: int) -> Tensor:
    """What is left of x_..I in the direction, group by group -> (T, I)."""
    return _widened(grouped(x, groups) @ direction, direction, x.shape[-1])


def _widened(compressed: Tensor, direction: Tensor, features: int) -> Tensor:
    return (compressed[..., None] * direction).flatten(1)[:, :features]


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, direction: Tensor, groups: int, scale: float
    ) -> Tensor:
        ctx.shape, ctx.groups, ctx.scale = x.shape, groups, scale
        ctx.save_for_backward(grouped(x, groups) @ direction, weight, direction)
        return F.linear(x, weight)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        compressed, weight, direction = ctx.saved_tensors
        of_x = (gradient @ weight).reshape(ctx.shape) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            x = _widened(compressed, direction, ctx.shape[-1]) * ctx.scale
            of_weight = gradient.reshape(-1, gradient.shape[-1]).mT @ x
        return of_x, of_weight, None, None, None


def compressed_linear(
    x: Tensor, weight: Tensor, direction: Tensor, groups: int, scale: float
) -> Tensor:
    """x_..I Wᵀ for W_OI; all in one dtype."""
    found: Tensor = _Compressed.apply(x, weight, direction, groups, scale)  # type: ignore[no-untyped-call]
    return found
