"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS): the Hadamard product of two low-rank matrices.

    ΔW = s · (W1a W1b) ⊙ (W2a W2b),   s = alpha / rank

Its rank is up to rank². W2b starts at zero, so that ΔW is zero. With ``tucker`` both are cores between two factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import Tensor

from trimtab.adapt.contract import Layer, Params, Spec, kaiming_uniform, zeros
from trimtab.adapt.weight import Lycoris, columns, with_core


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
        "use_effective_conv2d": ("tucker", False),
    }  # fmt: skip
    short_names: ClassVar[Mapping[str, str]] = {
        name: name[5:]
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    }
    disk: ClassVar[Mapping[str, str]] = {name: name for name in short_names}
    scales: ClassVar[str] = "w1_a"

    @property
    def rescales(self) -> bool:
        return True  # as PEFT's

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        core = self.core(layer)
        into = columns(layer) if core is None else layer.shape[1]
        left = (layer.shape[0], self.rank) if core is None else (self.rank, layer.shape[0])
        specs = {
            "w1_a": Spec("hada_w1_a", left, kaiming_uniform),
            "w1_b": Spec("hada_w1_b", (self.rank, into), kaiming_uniform),
            "w2_a": Spec("hada_w2_a", left, kaiming_uniform),
            "w2_b": Spec("hada_w2_b", (self.rank, into), zeros),
        }
        cores = (
            {}
            if core is None
            else {t: Spec(f"hada_{t}", core, kaiming_uniform) for t in ("t1", "t2")}
        )
        return specs | cores

    def change(self, p: Params, layer: Layer) -> Tensor:
        return _matrix(p, "1") * _matrix(p, "2") * self.scaling


def _matrix(p: Params, number: str) -> Tensor:
    a, b = p[f"w{number}_a"], p[f"w{number}_b"]
    return with_core(p[f"t{number}"], a, b) if f"t{number}" in p else a @ b
