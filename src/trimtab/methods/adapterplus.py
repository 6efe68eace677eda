"""Adapter+ (Steitz & Roth 2024, arXiv 2406.06820): a bottleneck after each block, scaled channel by channel.

    out = y + s ⊙ ( W_up gelu(W_down y + b_down) + b_up ),   y the block's output, s starts at 1

In training each example leaves the adapter of a block out with probability ``drop`` (stochastic depth).
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Init, Layer, Params, Spec, ones, truncated_normal
from trimtab.adapt.mlp import InsertedMLP


@final
class AdapterPlus(InsertedMLP):
    """``AdapterPlus(reduction=96)``: at the output of every block."""

    kind: ClassVar[str] = "adapterplus"
    lr: ClassVar[float] = 1e-3
    weight_decay: ClassVar[float] = 1e-4
    inits: ClassVar[tuple[Init, Init]] = (truncated_normal(1e-2), truncated_normal(1e-2))

    targets: str | tuple[str, ...] = "blocks"
    reduction: int | None = Field(default=96, ge=1)
    """The width divided by it is the size of the middle."""
    drop: float = Field(default=0.1, ge=0.0, lt=1.0)
    """How often an example leaves out the adapter of a block, in training."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        return {
            **super().tensors(layer, role),
            "s": Spec("adapter_scale", (layer.out_features,), ones),
        }

    def change(self, p: Params, h: Tensor, at: At) -> Tensor:
        change = super().change(p, h, at)
        if not self.drop or not at.training:
            return change
        draw = at.generator(h.device)
        kept = at.per_unit(
            lambda count: torch.rand(count, device=h.device, generator=draw) >= self.drop
        )
        return change * at.part.spread(kept.to(h.dtype) / (1 - self.drop), h)
