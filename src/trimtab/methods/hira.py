"""HiRA (Huang et al. 2025, ICLR): a low-rank change in proportion to the weight itself.

    ΔW = W ⊙ (B A),   A_RI, B_OR

The Hadamard product with the frozen weight makes the change of high rank. B starts at zero; an embedding swaps the two
factors, so that its A does. For a convolution they have the forms of LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import Layer, Method, Params, Place, Spec, kaiming_uniform, zeros
from trimtab.adapt.peft_config import read_options
from trimtab.adapt.values import normal
from trimtab.adapt.weight import Dropping
from trimtab.models.anatomy import Anatomy


@final
class HiRA(Dropping):
    """``HiRA(rank=32)``."""

    kind: ClassVar[str] = "hira"
    lr: ClassVar[float] = 4.5e-3
    peft_type: ClassVar[str | None] = "HIRA"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding")
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 32), "hira_dropout": ("dropout", 0.0), "rank_pattern": ("rank_pattern", {}),
    }  # fmt: skip
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank"}
    short_names: ClassVar[Mapping[str, str]] = {
        "hira_A": "A", "hira_B": "B", "hira_embedding_A": "A", "hira_embedding_B": "B",
    }  # fmt: skip
    disk: ClassVar[Mapping[str, str]] = {name: name for name in short_names}
    scales: ClassVar[str] = "B"

    rank: int = Field(default=32, ge=1)
    """Rank of the factors; that of the change is far higher."""
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    """End of a path -> its rank."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        ones = (1,) * (len(layer.shape) - 2)
        a, b = (self.rank, *layer.shape[1:]), (layer.shape[0], self.rank, *ones)
        if layer.kind == "embedding":
            return {"A": Spec("hira_embedding_A", a, zeros), "B": Spec("hira_embedding_B", b, normal(1))}  # fmt: skip
        return {"A": Spec("hira_A", a, kaiming_uniform), "B": Spec("hira_B", b, zeros)}

    def change(self, p: Params, layer: Layer) -> Tensor:
        product = p["B"].flatten(1) @ p["A"].flatten(1)
        return layer.dense().to(product.dtype) * product.reshape(layer.shape)

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        """Exact: ranks are concatenated."""
        a = torch.cat([p["A"] for _, p in parts])
        b = torch.cat([p["B"] for _, p in parts], dim=1)
        return self.replace(rank=a.shape[0]), {"A": a, "B": b}

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        """PEFT reads `rank_pattern` only where its model has a HiRA already, and is silent about it elsewhere."""
        return not self.rank_pattern and super().in_peft(anatomy, places)

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> HiRA | None:
        fields = read_options(config, cls.peft_options, cls.peft_lacks, cls.kind)
        ranks = {shape[0] for key, shape in slots.items() if key.endswith("_A")}
        if ranks == {fields["rank"]}:  # a first adapter of PEFT's, which passed over the pattern
            fields["rank_pattern"] = {}
        return cls(**fields)
