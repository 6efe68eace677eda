"""Gaussian: A ~ N(0, 1/rank²), B = 0, which PEFT calls so. The LoRA paper names a Gaussian without its spread.

On an embedding too, where PEFT keeps its own A = 0 and B ~ N(0, 1).
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from trimtab.adapt.initial import Initialisation
from trimtab.adapt.observed import Observed


@final
class Gaussian(Initialisation):
    """``LoRA(init="gaussian")``."""

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        a_RI = torch.randn(rank, weight.shape[1], generator=generator) / rank
        return a_RI, torch.zeros(weight.shape[0], rank)
