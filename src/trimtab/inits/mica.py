"""MiCA (2026, arXiv 2604.01694): B begins, and stays, as the least singular directions of the weight's outputs.

W = U S Vᵀ,   B = U[:, −r:] (kept),   A = 0
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.observed import Observed


@final
class MiCA(Initialisation):
    """``LoRA(init="mica")``."""

    keeps_b: ClassVar[bool] = True

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape), "mica")
        u, _, _ = torch.linalg.svd(weight, full_matrices=False)
        return weight.new_zeros(rank, weight.shape[1]), u[:, -rank:]
