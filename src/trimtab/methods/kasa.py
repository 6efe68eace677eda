"""KaSA (Wang et al. 2024, arXiv 2412.06071): the least singular values of W make room for learnt ones.

    y = (W − U₋ S₋ V₋ᵀ) x + s · B diag(d) A x,   U₋ S₋ V₋ᵀ the ``rank`` smallest components of W

In training a loss keeps d small and the factors near orthogonal:

    β ‖d‖² + γ (‖Bᵀ B − I‖ + ‖A Aᵀ − I‖)

The base is never written: what is taken out of it is kept in the adapter, as two factors more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Place, Spec, normal
from trimtab.adapt.factors import paired
from trimtab.adapt.least import Cut
from trimtab.adapt.lowrank import BIASES
from trimtab.models.anatomy import Anatomy

LOSS = "kasa"
"""The name of its loss."""


@final
class KaSA(Cut):
    """``KaSA(rank=16)``; other fields as LoRA's."""

    kind: ClassVar[str] = "kasa"
    variant: ClassVar[str] = "kasa_config"
    parts: ClassVar[Mapping[str, str]] = {"beta": "beta", "gamma": "gamma"}
    disk: ClassVar[Mapping[str, str]] = {**Cut.disk, "lora_diag": "lora_diag"}
    short_names: ClassVar[Mapping[str, str]] = {**Cut.short_names, "lora_diag": "d"}

    beta: float = Field(default=1e-4, ge=0)
    """β, the weight of ‖d‖² in the loss."""
    gamma: float = Field(default=1e-3, ge=0)
    """γ, the weight of how far the factors are from orthogonal."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs = super().tensors(layer, role)
        own = {} if role in BIASES else {"d": Spec("lora_diag", (self.rank,), normal(1.0))}
        return specs | own

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
