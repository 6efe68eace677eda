"""Orthogonal: A and B lie in orthogonal halves of the rank's space, so that B A = 0 though neither is zero.

    Q_RR orthogonal,   A = Q_oddᵀ G / 10,   B = G' Q_even / 10,   G and G' standard normal

As PEFT has it (datta0.github.io/posts/rethink-lora-init); the rank must be even.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from trimtab.adapt.initial import Initialisation
from trimtab.adapt.observed import Observed
from trimtab.errors import ConfigError


@final
class Orthogonal(Initialisation):
    """``LoRA(init="orthogonal")``."""

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        if rank % 2:
            raise ConfigError(f"init orthogonal halves the rank, so it must be even, not {rank}.")
        out, width = weight.shape
        # drawn in single precision and in this order as PEFT draws, multiplied in double: B A is closer to zero
        q_RR, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator).double())
        right = torch.randn(width, rank // 2, generator=generator).double()
        left = torch.randn(rank // 2, out, generator=generator).double()
        return (right @ q_RR[0::2]).T / 10, left.T @ q_RR[1::2] / 10
