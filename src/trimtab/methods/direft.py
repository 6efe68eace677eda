"""DiReFT (Wu et al. 2024, arXiv 2404.03592): LoReFT without the orthonormal subspace and without the difference.

    h' = h + W₂ᵀ( W₁ h + b ),   at the first and last positions of the prompt

This is the paper's; pyreft's class of that name keeps W₂ orthonormal.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from trimtab.adapt.contract import Params
from trimtab.adapt.intervention import Intervention


@final
class DiReFT(Intervention):
    """``DiReFT(rank=8, first=7, last=7)``: at the output of every block."""

    kind: ClassVar[str] = "direft"

    def change(self, p: Params, h: Tensor) -> Tensor:
        return F.linear(h, p["source"], p["b"]) @ p["basis"]

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        changed = (f"{end}.{short}" for end in self.ends for short in ("source", "b"))
        return {**p, **{key: p[key] * weight for key in changed}}
