"""Norm tuning (Zhao et al. 2023, arXiv 2312.11420): train the weights and biases of the norms alone.

y = γ' ⊙ norm(x) + β',   γ' and β' start as copies
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

from trimtab.adapt.replaced import Replaced


@final
class Norms(Replaced):
    """``Norms()``: every norm of the model; ``targets`` narrows them."""

    kind: ClassVar[str] = "norms"
    lr: ClassVar[float] = 1e-3
    slot: ClassVar[str] = "ln_tuning_layers"
    peft_type: ClassVar[str | None] = "LN_TUNING"
    peft_kinds: ClassVar[tuple[str, ...]] = ("norm",)
    disk: ClassVar[Mapping[str, str]] = {
        "ln_tuning_layers.weight": "ln_tuning_layers.weight",
        "ln_tuning_layers.bias": "ln_tuning_layers.bias",
    }

    targets: str | tuple[str, ...] = "norms"
