"""HiRA (Huang et al. 2025, ICLR): a low-rank change in proportion to the weight itself.

    ΔW = W ⊙ (B A),   A_RI, B_OR

The Hadamard product with the frozen weight makes the change of high rank. B starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import Layer, Method, Params, Spec, kaiming_uniform, zeros
from trimtab.adapt.weight import WeightDelta, columns


@final
class HiRA(WeightDelta):
    """``HiRA(rank=32)``."""

    kind: ClassVar[str] = "hira"
    lr: ClassVar[float] = 4.5e-3
    peft_type: ClassVar[str | None] = "HIRA"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {"r": ("rank", 32)}
    peft_lacks: ClassVar[Mapping[str, Any]] = {"hira_dropout": 0.0, "rank_pattern": {}}
    disk: ClassVar[Mapping[str, str]] = {"hira_A": "hira_A", "hira_B": "hira_B"}
    short_names: ClassVar[Mapping[str, str]] = {"hira_A": "A", "hira_B": "B"}
    scales: ClassVar[str] = "B"

    rank: int = Field(default=32, ge=1)
    """Rank of the factors; that of the change is far higher."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        return {
            "A": Spec("hira_A", (self.rank, columns(layer)), kaiming_uniform),
            "B": Spec("hira_B", (layer.shape[0], self.rank), zeros),
        }

    def change(self, p: Params, layer: Layer) -> Tensor:
        return layer.dense().to(p["B"].dtype) * (p["B"] @ p["A"]).reshape(layer.shape)

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        """Exact: ranks are concatenated."""
        a = torch.cat([p["A"] for _, p in parts])
        b = torch.cat([p["B"] for _, p in parts], dim=1)
        return self.replace(rank=a.shape[0]), {"A": a, "B": b}
