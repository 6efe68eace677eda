"""LoKr (LyCORIS; KronA, Edalati et al. 2022, arXiv 2212.10650): a Kronecker product.

    ΔW = s · W1 ⊗ W2,   W1 (o₁, i₁), W2 (o₂, i₂),   o₁ o₂ = out, i₁ i₂ = in,   s = alpha / rank

W2 is a product of two factors where the rank is below half its larger side (with ``tucker`` and a core between
them), and W1 too with ``both``. W1 starts at zero, so that ΔW is zero. A kernel belongs to W2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from trimtab.adapt.contract import Init, Layer, Params, Spec, kaiming_uniform, zeros
from trimtab.adapt.weight import Lycoris, columns, with_core


@final
class LoKr(Lycoris):
    """``LoKr(rank=8, factor=4)``; ``factor`` -1 splits each side nearest to its square root."""

    kind: ClassVar[str] = "lokr"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "LOKR"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 8), "alpha": ("alpha", 8), "decompose_both": ("both", False), "decompose_factor": ("factor", -1),
        "rank_dropout": ("rank_dropout", 0.0), "module_dropout": ("module_dropout", 0.0),
        "rank_pattern": ("rank_pattern", {}), "alpha_pattern": ("alpha_pattern", {}),
        "use_effective_conv2d": ("tucker", False), "rank_dropout_scale": ("rank_dropout_scale", False),
    }  # fmt: skip
    short_names: ClassVar[Mapping[str, str]] = {
        name: name[5:]
        for name in (
            "lokr_w1",
            "lokr_w1_a",
            "lokr_w1_b",
            "lokr_w2",
            "lokr_w2_a",
            "lokr_w2_b",
            "lokr_t2",
        )
    }
    disk: ClassVar[Mapping[str, str]] = {name: name for name in short_names}

    factor: int = -1
    """Size of the first factor of each side, where it divides the side; -1 splits as evenly as it can."""
    both: bool = False
    """Split W1 into low-rank factors too, where the rank is below half its larger side."""

    rank_dropout_scale: bool = False
    """Let the rows of ΔW that are left grow by as much as `rank_dropout` took away."""

    @property
    def rescales(self) -> bool:
        return self.rank_dropout_scale

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        o1, o2 = split(layer.shape[0], self.factor)
        i1, i2 = split(layer.shape[1], self.factor)
        small = self.rank < max(o1, i1) / 2
        first = self._factor("w1", (o1, i1), zeros, low=self.both and small)
        if self.rank >= max(o2, i2) / 2:
            return first | self._factor(
                "w2", (o2, i2, *layer.shape[2:]), kaiming_uniform, low=False
            )
        core = self.core(layer)
        if core is None:
            kernel = columns(layer) // layer.shape[1]
            return first | self._factor("w2", (o2, i2 * kernel), kaiming_uniform, low=True)
        return first | {
            "w2_a": Spec("lokr_w2_a", (self.rank, o2), kaiming_uniform),
            "w2_b": Spec("lokr_w2_b", (self.rank, i2), kaiming_uniform),
            "t2": Spec("lokr_t2", core, kaiming_uniform),
        }

    def _factor(
        self, name: str, shape: tuple[int, ...], first: Init, *, low: bool
    ) -> dict[str, Spec]:
        if not low:
            return {name: Spec(f"lokr_{name}", shape, first)}
        return {
            f"{name}_a": Spec(f"lokr_{name}_a", (shape[0], self.rank), first),
            f"{name}_b": Spec(f"lokr_{name}_b", (self.rank, shape[1]), kaiming_uniform),
        }

    def change(self, p: Params, layer: Layer) -> Tensor:
        w1, w2 = _whole(p, "w1") * self.scaling, _whole(p, "w2")
        # A whole W2 of a convolution in one dimension has three axes, and PEFT pairs the last two with those of W1: no
        # Kronecker product of channels, but a change with the same entries, and what its files mean.
        order = "badc..." if w2.dim() == 3 else "abcd..."
        return torch.einsum(f"ac,bd...->{order}", w1, w2).reshape(layer.shape)

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        name = "w1" if "w1" in p else "w1_a"
        return {**p, name: p[name] * weight}


def _whole(p: Params, name: str) -> Tensor:
    if name in p:
        return p[name]
    a, b = p[f"{name}_a"], p[f"{name}_b"]
    return with_core(p["t2"], a, b) if name == "w2" and "t2" in p else a @ b


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """``size`` as a product of two: with ``factor`` where that divides it, else as even as it can be below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = int(size**0.5) if factor < 0 else min(factor, int(size**0.5))
    small = next(d for d in range(most, 0, -1) if size % d == 0)
    return small, size // small
