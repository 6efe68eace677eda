"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000): the first step of the factors is to follow that of the whole weight.

    G = mean of ∂loss/∂W = U S Vᵀ,   A = c · V[:, :r]ᵀ,   B = c · U[:, r:2r],   c = out^¼ / √γ

That is the authors' code ("stable", direction "ArB2r"). PEFT's port has another scale under that name: B alone is
multiplied by c, and by the singular values; ``scale="peft"`` is that one. The gradient is of batches that
`trimtab.attach` is given.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.decompose import leading
from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.observed import Gradients, Observation, Observed


@final
class LoRAGA(Initialisation):
    """``LoRA(init="lora-ga")``, ``LoRA(init="lora-ga(gamma=64)")``."""

    away: ClassVar[bool] = True

    gamma: float = Field(default=16.0, gt=0)
    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    scale: Literal["stable", "peft"] = "stable"

    def observes(self, rank: int) -> Observation | None:
        return Gradients()

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape) // 2, "lora-ga")
        gradient = observed["gradient"].to(weight)
        u, s, v = leading(gradient, min(4 * rank, *weight.shape), 4, generator)
        of_a, of_b = {
            "ArB2r": (slice(0, rank), slice(rank, 2 * rank)),
            "A2rBr": (slice(rank, 2 * rank), slice(0, rank)),
            "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        }[self.direction]
        size = weight.shape[0] ** 0.25 / self.gamma**0.5
        if self.scale == "peft":
            return v[of_a], u[:, of_b] * s[of_b] * size
        return v[of_a] * size, u[:, of_b] * size
