"""VeLoRA (Miles et al. 2024, arXiv 2405.17991): LoRA that keeps little of its input for backward.

    y = W x + s · B A x;   in backward   ∂A = gᵀ x̂,   x̂ = scale · Σ over groups g of (x_g · v) v

Each group of features is kept as one number, its part in a direction v of length 1: that of the mean group of each
batch, or of the first one, or drawn. What is computed is LoRA's; the gradient of A is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Spec, zeros
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.variant import Variant
from trimtab.kernels.compressed import compressed_linear, group_width, mean_direction

SLOT = "lora_velora_embed"


@final
class VeLoRA(Variant):
    """``VeLoRA(rank=16, groups=32)``; other fields as LoRA's."""

    kind: ClassVar[str] = "velora"
    variant: ClassVar[str] = "velora_config"
    parts: ClassVar[Mapping[str, str]] = {
        "num_groups": "groups", "scale": "backward_scale", "init_type": "direction",
    }  # fmt: skip
    linear_only: ClassVar[str] = "keeps groups of the features of linear layers"
    disk: ClassVar[Mapping[str, str]] = {**LowRank.disk, SLOT: SLOT}
    short_names: ClassVar[Mapping[str, str]] = {**LowRank.short_names, SLOT: "v"}

    groups: int = Field(default=64, ge=1)
    """Numbers that are kept of each position."""
    backward_scale: float = Field(default=1.0, gt=0)
    """Of the input that backward takes."""
    direction: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """v: of each batch, of the first one alone, or drawn."""

    @property
    def fixed(self) -> frozenset[str]:
        return super().fixed | {SLOT}

    @property
    def counts_padding(self) -> bool:
        return self.direction != "random"

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        shape = (group_width(layer.in_features, self.groups),)
        first = _drawn if self.direction == "random" else zeros
        own = {} if role in BIASES else {"v": Spec(SLOT, shape, first, cast=False)}
        return super().tensors(layer, role) | own

    def change(self, p: Params, x: Tensor, at: At) -> Tensor:
        a, b = self.factors(p)
        if not at.training or not torch.is_grad_enabled():
            return F.linear(F.linear(x, a), b)
        v = self._direction(p["v"], x.detach()).to(x.dtype)
        return F.linear(compressed_linear(x, a, v, self.groups, self.backward_scale), b)

    @torch.no_grad()
    def _direction(self, kept: Tensor, x: Tensor) -> Tensor:
        """v, from now on too."""
        if self.direction == "random":
            return kept.clone()
        mean = mean_direction(x, self.groups).to(kept)
        once = self.direction == "batch_average_once"
        return kept.copy_(torch.where(kept.any(), kept, mean) if once else mean).clone()


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random direction."""
    return F.normalize(torch.randn(shape, generator=generator), dim=0)
