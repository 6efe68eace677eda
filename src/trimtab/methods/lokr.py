"""LoKr (LyCORIS; KronA, Edalati et al. 2022, arXiv 2212.10650): a Kronecker product.

    ΔW = s · W1 ⊗ W2,   W1 (o₁, i₁), W2 (o₂, i₂),   o₁ o₂ = out, i₁ i₂ = in,   s = alpha / rank

W2 is a product of two factors where the rank is below half its larger side, and W1 too with ``both``. W1
starts at zero, so that ΔW is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from trimtab.adapt.contract import Layer, Params, Spec, kaiming_uniform, zeros
from trimtab.adapt.weight import Lycoris, columns


@final
class LoKr(Lycoris):
    """``LoKr(rank=8, factor=4)``; ``factor`` -1 splits each side nearest to its square root."""

    kind: ClassVar[str] = "lokr"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "LOKR"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 8), "alpha": ("alpha", 8), "decompose_both": ("both", False), "decompose_factor": ("factor", -1),
        "rank_dropout": ("rank_dropout", 0.0), "module_dropout": ("module_dropout", 0.0),
        "rank_pattern": ("rank_pattern", {}), "alpha_pattern": ("alpha_pattern", {}),
    }  # fmt: skip
    peft_lacks: ClassVar[Mapping[str, Any]] = {
        "use_effective_conv2d": False, "rank_dropout_scale": False,
    }  # fmt: skip
    short_names: ClassVar[Mapping[str, str]] = {
        name: name[5:]
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    }
    disk: ClassVar[Mapping[str, str]] = {name: name for name in short_names}

    factor: int = -1
    """Size of the first factor of each side, where it divides the side; -1 splits as evenly as it can."""
    both: bool = False
    """Split W1 into low-rank factors too, where the rank is below half its larger side."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        o1, o2 = split(layer.shape[0], self.factor)
        i1, i2 = split(layer.shape[1], self.factor)
        kernel = columns(layer) // layer.shape[1]
        first = self.both and self.rank < max(o1, i1) / 2
        second = self.rank < max(o2, i2) / 2
        return {
            **self._factor("w1", o1, i1, low=first, first=zeros),
            **self._factor("w2", o2, i2 * kernel, low=second, first=kaiming_uniform),
        }

    def _factor(self, name: str, rows: int, cols: int, *, low: bool, first: Any) -> dict[str, Spec]:
        if not low:
            return {name: Spec(f"lokr_{name}", (rows, cols), first)}
        return {
            f"{name}_a": Spec(f"lokr_{name}_a", (rows, self.rank), first),
            f"{name}_b": Spec(f"lokr_{name}_b", (self.rank, cols), kaiming_uniform),
        }

    def change(self, p: Params, layer: Layer) -> Tensor:
        return torch.kron(_whole(p, "w1") * self.scaling, _whole(p, "w2"))

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        name = "w1" if "w1" in p else "w1_a"
        return {**p, name: p[name] * weight}


def _whole(p: Params, name: str) -> Tensor:
    return p[name] if name in p else p[f"{name}_a"] @ p[f"{name}_b"]


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """``size`` as a product of two: with ``factor`` where that divides it, else as even as it can be below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = int(size**0.5) if factor < 0 else min(factor, int(size**0.5))
    small = next(d for d in range(most, 0, -1) if size % d == 0)
    return small, size // small
