"""PiSSA (Meng et al. 2024, arXiv 2404.02948): the factors begin as the principal part of the weight.

    W = U S Vᵀ,   A = √(S_r / s) V_rᵀ,   B = U_r √(S_r / s),   so that s · B A is W's best approximation of rank r

``niter`` takes a randomised decomposition with so many iterations in place of the exact one (much faster).
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.decompose import leading
from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.observed import Observed


@final
class PiSSA(Initialisation):
    """``LoRA(init="pissa")``, ``LoRA(init="pissa(niter=16)")``."""

    away: ClassVar[bool] = True

    niter: int | None = Field(default=None, ge=0)

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape), "pissa")
        exact = self.niter is None
        u, s, v = leading(weight, min(weight.shape) if exact else rank, self.niter or 0, generator)
        root = (s[:rank] / scaling).sqrt()
        return root[:, None] * v[:rank], u[:, :rank] * root
