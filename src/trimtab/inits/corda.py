"""CorDA (Yang et al. 2024, arXiv 2406.05223): the factors begin as parts of the weight, seen by the layer's own inputs.

    C = mean of Xᵀ X over batches + damping,   W C = U S Vᵀ,   A = √(S_k / s) (V_k)ᵀ C⁻¹,   B = U_k √(S_k / s)

``ipm`` (instruction-previewed) takes the r largest k: what the data of the new task use most is what is trained.
``kpm`` (knowledge-preserved) takes the r smallest: what data of the old knowledge use most stays. X is divided by its
largest value in each batch; the damping, 1 % of the mean of C's diagonal, is doubled until C⁻¹ is that. All as PEFT
has it. Batches are those that `trimtab.attach` is given; padding is left out, as are positions whose label is -100.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.observed import Covariance, Observation, Observed
from trimtab.errors import DataError


@final
class CorDA(Initialisation):
    """``LoRA(init="corda")``, ``LoRA(init="corda(mode=kpm)")``."""

    away: ClassVar[bool] = True

    mode: Literal["ipm", "kpm"] = "ipm"

    def observes(self, rank: int) -> Observation | None:
        return Covariance()

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape), "corda")
        damped_II, inverse_II = _damped(observed["covariance"].to(weight))
        u, s, v = torch.linalg.svd(weight @ damped_II, full_matrices=False)
        chosen = slice(0, rank) if self.mode == "ipm" else slice(len(s) - rank, len(s))
        root = (s[chosen] / scaling).sqrt()
        return root[:, None] * (v @ inverse_II)[chosen], u[:, chosen] * root


def _damped(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """A covariance that can be inverted, and its inverse."""
    eye = torch.eye(len(covariance)).to(covariance)
    mean = covariance.diagonal().mean()
    if not bool(covariance.isfinite().all()) or not bool(mean > 0):
        raise DataError(
            "init corda: the inputs of a layer are all zero, or hold infinities or NaN."
        )
    damping = 0.01
    while True:
        damped = covariance + eye * mean * damping
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, eye)) < 0.05:
            return damped, inverse
        damping *= 2
