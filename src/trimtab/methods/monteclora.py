"""MonteCLoRA (Seth et al. 2024, arXiv 2411.04358): in training A is a weighted mean of random draws around itself.

    y = W x + s · B A' x,   A' = A + ε · Σₙ πₙ Zₙ √V

V and π are drawn too (`trimtab.adapt.variational`), from what is learnt beside the factors and held near its prior by
a loss. In evaluation it is LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Spec, constant, uniform_from_zero
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.variant import Variant
from trimtab.adapt.variational import SLOTS, divergence, drawn, identity, sampled

LOSS = "variational"
"""The name of its loss."""


@final
class MonteCLoRA(Variant):
    """``MonteCLoRA(rank=16, samples=8)``; other fields as LoRA's."""

    kind: ClassVar[str] = "monteclora"
    variant: ClassVar[str] = "monteclora_config"
    parts: ClassVar[Mapping[str, str]] = {
        "num_samples": "samples", "use_entropy": "entropy", "dirichlet_prior": "dirichlet_prior",
        "sample_scaler": "noise", "kl_loss_weight": "kl_weight",
    }  # fmt: skip
    unused: ClassVar[tuple[str, ...]] = ("buffer_size",)
    linear_only: ClassVar[str] = "draws around matrices"
    disk: ClassVar[Mapping[str, str]] = {**LowRank.disk, **{slot: slot for slot in SLOTS}}
    short_names: ClassVar[Mapping[str, str]] = {**LowRank.short_names, **SLOTS}

    samples: int = Field(default=8, ge=1)
    """Draws in each forward."""
    entropy: bool = False
    """Keep π from gathering on one draw, by a loss of Σ π²."""
    dirichlet_prior: float = Field(default=0.1, gt=0)
    """Prior concentration of the Dirichlet distribution of π."""
    noise: float = 1e-4
    """ε, how far draws stray."""
    kl_weight: float = 1e-5
    """Weight of the divergences from the priors."""

    @property
    def fixed(self) -> frozenset[str]:
        return super().fixed | {slot for slot, short in SLOTS.items() if short in ("V", "pi")}

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs, n, r = super().tensors(layer, role), self.samples, self.rank
        if role in BIASES:
            return specs
        std, rho, variance, weights = SLOTS
        return {
            **specs,
            "std": Spec(std, (r,), uniform_from_zero),
            "rho": Spec(rho, (n,), uniform_from_zero),
            "V": Spec(variance, (r, r), identity, cast=False),
            "pi": Spec(weights, (n,), constant(1 / n), cast=False),
        }

    def change(self, p: Params, x: Tensor, at: At) -> Tensor:
        if not at.training:
            return super().change(p, x, at)
        draws = drawn(p["A"], self.samples, at.generator(p["A"].device))
        a, variance, weights = sampled(p["A"], p["std"], p["rho"], draws, self.noise)
        with torch.no_grad():
            p["V"].copy_(variance.diag())
            p["pi"].copy_(weights)
        loss = self.kl_weight * divergence(p["std"], p["rho"], variance, self.dirichlet_prior)
        at.add_loss(LOSS, (loss + weights.square().sum() * self.entropy) / at.count)
        return super().change({**p, "A": a}, x, at)
