"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS): the Hadamard product of two low-rank matrices.

    ΔW = s · (W1a W1b) ⊙ (W2a W2b),   s = alpha / rank

Its rank is up to rank². W2b starts at zero, so that ΔW is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import Tensor

from trimtab.adapt.contract import Layer, Params, Spec, kaiming_uniform, zeros
from trimtab.adapt.weight import Lycoris, columns


@final
class LoHa(Lycoris):
    """``LoHa(rank=8, alpha=8)``."""

    kind: ClassVar[str] = "loha"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "LOHA"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 8), "alpha": ("alpha", 8),
        "rank_dropout": ("rank_dropout", 0.0), "module_dropout": ("module_dropout", 0.0),
        "rank_pattern": ("rank_pattern", {}), "alpha_pattern": ("alpha_pattern", {}),
    }  # fmt: skip
    peft_lacks: ClassVar[Mapping[str, Any]] = {"use_effective_conv2d": False}
    short_names: ClassVar[Mapping[str, str]] = {
        name: name[5:] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    }
    disk: ClassVar[Mapping[str, str]] = {name: name for name in short_names}
    scales: ClassVar[str] = "w1_a"

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        left, right = (layer.shape[0], self.rank), (self.rank, columns(layer))
        return {
            "w1_a": Spec("hada_w1_a", left, kaiming_uniform),
            "w1_b": Spec("hada_w1_b", right, kaiming_uniform),
            "w2_a": Spec("hada_w2_a", left, kaiming_uniform),
            "w2_b": Spec("hada_w2_b", right, zeros),
        }

    def change(self, p: Params, layer: Layer) -> Tensor:
        return (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"]) * self.scaling
