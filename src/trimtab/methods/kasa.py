"""KaSA (Wang et al. 2024, arXiv 2412.06071): the least singular values of W make room for learnt ones.

    y = (W − U₋ S₋ V₋ᵀ) x + s · B diag(d) A x,   U₋ S₋ V₋ᵀ the ``rank`` smallest components of W

In training a loss keeps d small and the factors near orthogonal:

    β ‖d‖² + γ (‖Bᵀ B − I‖ + ‖A Aᵀ − I‖)

The base is never written: what is taken out of it is kept in the adapter, as two factors more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Place, Spec, normal
from trimtab.adapt.factors import KEPT, factor_specs, paired
from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.observed import Observed
from trimtab.adapt.variant import Variant
from trimtab.models.anatomy import Anatomy

LOSS = "kasa"
"""The name of its loss."""


@final
class KaSA(Variant):
    """``KaSA(rank=16)``; other fields as LoRA's."""

    kind: ClassVar[str] = "kasa"
    variant: ClassVar[str] = "kasa_config"
    starts: ClassVar[Any] = "at zero"
    disk: ClassVar[Mapping[str, str]] = {
        **LowRank.disk,
        "lora_diag": "lora_diag",
        **{slot: slot for slot in KEPT},
    }
    short_names: ClassVar[Mapping[str, str]] = {**LowRank.short_names, "lora_diag": "d"}

    beta: float = Field(default=1e-4, ge=0)
    """β, the weight of ‖d‖² in the loss."""
    gamma: float = Field(default=1e-3, ge=0)
    """γ, the weight of how far the factors are from orthogonal."""

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if not all([self.alpha, *self.alpha_pattern.values()]):
            raise ValueError(
                "kasa: an alpha of 0 leaves no scale for what is taken out of the base"
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
        taken = factor_specs(layer, self.rank, self.scaling, _Least())
        kept = {short: taken[short] for short in ("A0", "B0")}
        return {**specs, "d": Spec("lora_diag", (self.rank,), normal(1.0)), **kept}

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        d = p["d"]
        return p["A"] * d.reshape(*d.shape, *(1,) * (p["A"].dim() - d.dim())), p["B"] * self.scaling

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.training and at.role not in BIASES:
            at.add_loss(LOSS, self.loss({short: at.layer.wide(t) for short, t in p.items()}))
        return super().delta(p, x, at)

    def loss(self, p: Params) -> Tensor:
        """The loss of one site, from its tensors in fp32."""
        a_GRI, b_GOR = paired(p["A"], p["B"], self.rank)
        grams = b_GOR.mT @ b_GOR, a_GRI @ a_GRI.mT
        apart = [
            torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1]).to(gram)).sum()
            for gram in grams
        ]
        return self.beta * p["d"].square().sum() + self.gamma * (apart[0] + apart[1])

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        """PEFT has no weights that are stored (in, out)."""
        layers = [anatomy.layer(path) for path in self.wrapped(places)]
        return super().in_peft(anatomy, places) and not any(layer.transposed for layer in layers)

    def variant_to_peft(self) -> dict[str, Any]:
        return {"kasa_config": {"beta": self.beta, "gamma": self.gamma}}

    @classmethod
    def fields_of_variant(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return cls.read(config, {"beta": "beta", "gamma": "gamma"})


class _Least(Initialisation):
    """The smallest singular components of a weight: s · B A is their sum."""

    away: ClassVar[bool] = True

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape) - 1, "kasa")
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return v[-rank:], u[:, -rank:] * (s[-rank:] / scaling)
