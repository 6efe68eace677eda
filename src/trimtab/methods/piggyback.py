"""Piggyback (Mallya et al. 2018, arXiv 1801.06519): a mask over the frozen weights.

    y = f(x; W ⊙ M),   M = 1 if m > threshold, else 0;   ternary:  −1 if m < 0,  0 up to the threshold,  1 above

Real-valued scores m are trained; the mask passes its gradient straight through to them. All scores start above the
threshold, so that nothing is masked. Training costs as much memory as full fine-tuning; what is shared
(`tt.exported`) is one bit for each weight, two where it is ternary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.bits import packed, unpacked
from trimtab.adapt.contract import Layer, Params, Place, Spec, constant, zeros
from trimtab.adapt.weight import WeightDelta, columns


@final
class Piggyback(WeightDelta):
    """``Piggyback(threshold=5e-3)``; ``gradient`` divides that of the scores by the mean of |W|, or by |W|."""

    kind: ClassVar[str] = "piggyback"
    lr: ClassVar[float] = 1e-4
    short_names: ClassVar[Mapping[str, str]] = {
        "piggyback_scores": "scores", "piggyback_kept": "kept", "piggyback_negative": "negative",
    }  # fmt: skip

    threshold: float = Field(default=5e-3, gt=0)
    """A weight is kept while its score lies above."""
    first: float = 1e-2
    """Where all scores start."""
    ternary: bool = False
    """Let weights change their sign too."""
    gradient: Literal["plain", "mean", "individual"] = "plain"
    """Divide the gradient of the scores by nothing, by the mean of |W|, or by each |W|."""
    bits: bool = False
    """The form to share: the mask alone, which is not trained any further."""

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset({"piggyback_kept", "piggyback_negative"})

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        shape = (layer.shape[0], columns(layer))
        if not self.bits:
            return {"scores": Spec("piggyback_scores", shape, constant(self.first), cast=False)}
        size = (-(-shape[0] * shape[1] // 8),)
        names = ("kept", "negative") if self.ternary else ("kept",)
        return {n: Spec(f"piggyback_{n}", size, _no_bits, cast=False) for n in names}

    def mask(self, scores: Tensor) -> Tensor:
        """The hard mask of these scores."""
        kept = (scores > self.threshold).to(scores.dtype)
        return kept - (scores < 0).to(scores.dtype) if self.ternary else kept

    def change(self, p: Params, layer: Layer) -> Tensor:
        weight = layer.dense().flatten(1)
        if self.bits:
            mask = unpacked(p["kept"], weight.shape)
            if self.ternary:
                mask = mask - 2 * unpacked(p["negative"], weight.shape)
            return weight * (mask - 1).to(weight.dtype)
        scores = p["scores"]
        through = scores - scores.detach()
        if self.gradient != "plain":
            size = weight.abs().to(scores.dtype)
            through = through / (size.mean() if self.gradient == "mean" else size.clamp_min(1e-12))
        mask = self.mask(scores.detach()) + through
        return weight * (mask - 1).to(weight.dtype)

    def plain(self) -> Piggyback:
        return self.replace(bits=True)

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        if self.bits:
            return dict(tensors)
        mask = self.mask(tensors["piggyback_scores"])
        found = {"piggyback_kept": packed(mask != 0)}
        return found | ({"piggyback_negative": packed(mask < 0)} if self.ternary else {})


def _no_bits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return zeros(shape, generator).to(torch.uint8)
