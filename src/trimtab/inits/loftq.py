"""LoftQ (Li et al. 2023, arXiv 2310.08659): the factors begin as what rounding the base to few bits lost.

    Q₁ = q(W);   U S Vᵀ = W − Q_t,   A_t = √(S_r / s) V_rᵀ,   B_t = U_r √(S_r / s);   Q_t+1 = q(W − s B_t A_t)

The model then computes with Q + s B A instead of W. q is NF4 with blocks of 64 (4 bits) or INT8 with a scale for each
row. Where the base is stored in few bits, Q is what it holds: one step from the weights that it was made of, or as many
as the base was loaded with (``storage="loftq(rank=16, iters=5)"``, `trimtab.frozen.loftq`). Where it is dense, it stays
as it is, and the adapter adds Q − W, which is found again from W whenever it is attached.

PEFT does not divide by the scale s when it begins, so that its s B A is the loss only where s = 1: ``scale="peft"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import kaiming_uniform
from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.observed import Observation, Observed, Original
from trimtab.errors import ConfigError
from trimtab.frozen.loftq import LoftQ as LoftQBase
from trimtab.frozen.loftq import compensated, nearest
from trimtab.kernels import eightbit, fourbit


@final
class LoftQ(Initialisation):
    """``LoRA(init="loftq")``, ``LoRA(init="loftq(iters=5)")``, ``LoRA(init="loftq(bits=8)")``."""

    bits: Literal[4, 8] = 4
    iters: int = Field(default=1, ge=1)
    scale: Literal["product", "peft"] = "product"
    stored: bool = False
    """Whether the base is stored in few bits itself; told by the model that it is attached to."""

    @property
    def beside(self) -> bool:
        return not self.stored

    @property
    def done(self) -> bool:
        return self.stored

    def to_peft(self) -> Mapping[str, Any]:
        steps = {"loftq_bits": self.bits, "loftq_iter": self.iters}
        return {} if self.stored else {"init_lora_weights": "loftq", "loftq_config": steps}

    def told(self) -> str | None:
        return f"loftq(bits={self.bits}, iters={self.iters}, scale='{self.scale}', stored=true)"

    def observes(self, rank: int) -> Observation | None:
        several = LoftQBase(rank=rank, iters=self.iters, bits=self.bits)
        return Original(storage=str(several) if self.iters > 1 else "")

    def base(self, weight: Tensor, rank: int) -> Tensor:
        return weight if self.stored else self._steps(weight, rank)[0]

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape), "loftq")
        original = observed.get("original")
        if original is not None:
            a, b = nearest(original.to(weight) - weight, rank)
        elif self.stored:  # a layer that is exempt from rounding lost nothing
            a_RI = kaiming_uniform((rank, weight.shape[1]), generator)
            return a_RI, torch.zeros(weight.shape[0], rank)
        else:
            _, a, b = self._steps(weight, rank)
        root = scaling**0.5 if self.scale == "product" else 1.0
        return a / root, b / root

    def _steps(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Q, and the factors of W − Q."""
        rounded = self._rounded(compensated(weight, rank, self.iters, self._rounded))
        return rounded, *nearest(weight - rounded, rank)

    def _rounded(self, weight: Tensor) -> Tensor:
        if not bool(weight.isfinite().all()):
            raise ConfigError(
                "init loftq: a weight holds infinities or NaN, and cannot be rounded."
            )
        if self.bits == 8:
            return eightbit.dequantise_rows(*eightbit.quantise_rows(weight), weight.dtype)
        return fourbit.dequantise(fourbit.quantise(weight, nested=False), weight.dtype)
