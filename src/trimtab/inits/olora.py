"""OLoRA (Büyükakyüz 2024, arXiv 2406.01775): the factors begin as the first part of a QR decomposition.

W = Q R,   B = Q[:, :r],   A = R[:r]
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from trimtab.adapt.initial import Initialisation, check_rank
from trimtab.adapt.observed import Observed


@final
class OLoRA(Initialisation):
    """``LoRA(init="olora")``."""

    away: ClassVar[bool] = True

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        check_rank(weight, rank, min(weight.shape), "olora")
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
