"""LoRA (Hu et al. 2021, arXiv 2106.09685): add a low-rank product beside a frozen layer.

    y = W x + s · B A x,   s = alpha / rank,  or  alpha / √rank with ``rslora`` (arXiv 2312.03732)

Fields, initial values and PEFT's grammar are those of `trimtab.adapt.lowrank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from trimtab.adapt.lowrank import LowRank


@final
class LoRA(LowRank):
    """``LoRA(rank=16, alpha=32, targets="all-linear")``, ``LoRA(init="pissa")``."""

    kind: ClassVar[str] = "lora"
    lr: ClassVar[float] = 2e-4

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> LoRA | None:
        return None if config.get("use_dora") else cls(**cls.fields_from_peft(config))
