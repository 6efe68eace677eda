"""The least singular components of a weight, which a variant of LoRA takes out of the base.

    ΔW = s · (B A − B₀ A₀),   s · B₀ A₀ = U₋ S₋ V₋ᵀ,   the ``rank`` smallest components of W = U S Vᵀ

PEFT cuts its base, and makes the cut again when it loads a file. Here B₀ and A₀ are kept in the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

import torch
from pydantic import model_validator
from torch import Tensor

from trimtab.adapt.contract import Layer, Spec
from trimtab.adapt.factors import KEPT, factor_specs
from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.lowrank import BIASES
from trimtab.adapt.observed import Observed
from trimtab.adapt.variant import Variant


@final
class Least(Initialisation):
    """Of one weight or group; at least one component is left in it."""

    away: ClassVar[bool] = True

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape) - 1, "by the least components")
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return v[-rank:], u[:, -rank:] * (s[-rank:] / scaling)


class Cut(Variant):
    """A variant beside which the base has lost its least components."""

    starts: ClassVar[Any] = "at zero"
    disk: ClassVar[Mapping[str, str]] = {**Variant.disk, **{slot: slot for slot in KEPT}}

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if not all([self.alpha, *self.alpha_pattern.values()]):
            raise ValueError(
                f"{self.kind}: an alpha of 0 leaves no scale for what is taken out of the base"
            )
        return self

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset(KEPT)

    @property
    def rebuilt(self) -> frozenset[str]:
        return frozenset(KEPT)

    @property
    def plain_rank(self) -> int:
        return 2 * self.rank

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs = super().tensors(layer, role)
        if role in BIASES:
            return specs
        taken = factor_specs(layer, self.rank, self.scaling, Least())
        return {**specs, **{short: taken[short] for short in ("A0", "B0")}}
