"""NoReFT (Wu et al. 2024, arXiv 2404.03592): LoReFT with a subspace that need not be orthonormal.

h' = h + W₂ᵀ( W₁ h + b − W₂ h ),   at the first and last positions of the prompt
"""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from trimtab.adapt.contract import At, Params
from trimtab.adapt.intervention import Intervention, of_end


@final
class NoReFT(Intervention):
    """``NoReFT(rank=8, first=7, last=7)``: at the output of every block."""

    kind: ClassVar[str] = "noreft"

    def change(self, p: Params, h: Tensor, at: At) -> Tensor:
        return F.linear(h, p["source"] - p["basis"], p["b"]) @ p["basis"]

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        result = dict(p)
        for end in self.ends:
            one = of_end(p, end)
            result[f"{end}.source"] = weight * one["source"] + (1 - weight) * one["basis"]
            result[f"{end}.b"] = weight * one["b"]
        return result
