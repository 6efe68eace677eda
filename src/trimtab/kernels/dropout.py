"""Dropout on a CPU that keeps a seed instead of a mask, and draws a byte for each element.

    y = x ∘ m / (1 − p),   m = 1 where a random byte is at least t, else 0

with t one of the two integers around 256 · p, drawn anew for each row such that an element is dropped with probability
p exactly. Torch draws masks several times as slowly, and keeps them in the dtype of x. The seed comes from torch's
default generator, so that `torch.manual_seed` and the checkpoints of torch govern it as they do torch's own.

Legend: N rows, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kernels.remade import remade
from trimtab.kernels.tracing import traced

BLOCK = 1 << 18
"""Elements of a block of rows."""


def dropout(x: Tensor, share: float) -> Tensor:
    """Of training: elements of x are zero with probability ``share``, the others scaled up."""
    plain = x.device.type != "cpu" or not x.is_floating_point() or not x.numel() or traced()
    if plain or not 0 < share < 1:
        return F.dropout(x, share)
    seed = drawn_seed()
    y: Tensor = _Dropout.apply(x, share, seed)  # type: ignore[no-untyped-call]
    return remade(y, dropped, x, share, seed)


def drawn_dropout(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """``F.dropout`` in training with a generator's numbers, by default those of torch's own; ``share`` is below 1."""
    if generator is None:
        return F.dropout(x, share)
    return x * drawn_masks(x, share, generator)


def drawn_masks(like: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """0 for elements that are dropped, and what the others grow by."""
    keeps = 1 - share
    return torch.empty_like(like).bernoulli_(keeps, generator=generator).div_(keeps)


def drawn_seed() -> int:
    """From torch's default generator."""
    return int(torch.randint(1 << 62, ()))


class Masks:
    """Of one seed, one after the other; asked again in the same order, they are the same."""

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._generator = torch.Generator().manual_seed(seed)

    def next_like(self, x: Tensor) -> Tensor:
        """For x of rows along its last axis: 0 where an element is dropped, else 1."""
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self._generator)
        bytes_ = words.view(torch.uint8)[: x.numel()].view(x.shape)
        of_row = torch.rand((*x.shape[:-1], 1), generator=self._generator)
        least = (256 * self._share - of_row).ceil_()  # of the bytes that do not drop
        return bytes_.to(x.dtype).sub_(least.sub_(1).to(x.dtype)).clamp_(0, 1)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, seed: int) -> Tensor:
        ctx.share, ctx.seed = share, seed
        return dropped(x, share, seed)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = outer
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            return _Dropout.apply(grad, ctx.share, ctx.seed), None, None  # type: ignore[no-untyped-call]
        return dropped(grad, ctx.share, ctx.seed), None, None


def dropped(x: Tensor, share: float, seed: int) -> Tensor:
    """What `dropout` makes of x with that seed."""
    masks = Masks(share, seed)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = [t.reshape(-1, t.shape[-1]) if t.dim() else t.reshape(1, 1) for t in (x, y)]
    some = max(BLOCK // max(rows[0].shape[-1], 1), 1)
    for x_NC, y_NC in zip(*(t.split(some) for t in rows), strict=True):
        torch.mul(x_NC, masks.next_like(x_NC), out=y_NC).mul_(1 / (1 - share))
    return y
