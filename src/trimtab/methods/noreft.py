"""NoReFT (Wu et al. 2024, arXiv 2404.03592): LoReFT with a subspace that need not be orthonormal.

h' = h + W₂ᵀ( W₁ h + b − W₂ h ),   at the first and last positions of the prompt
"""

from __future__ import annotations

from typing import ClassVar, final

from trimtab.adapt.intervention import Intervention


@final
class NoReFT(Intervention):
    """``NoReFT(rank=8, first=7, last=7)``: at the output of every block."""

    kind: ClassVar[str] = "noreft"
