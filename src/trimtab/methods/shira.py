"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): train a few weights of each matrix, and none of the others.

    y = W x + S x,   S has k trained values at places that are fixed before training

k = rank · (in + out), as many as a LoRA of that rank, or a ``share`` of the weights. The places are random, those
of the largest weights ("magnitude"), or those with the largest diagonal Fisher information over all targets
together ("fisher": FISH mask, Sung et al. 2021, arXiv 2111.09839), which needs batches. Values begin at zero; only
they have an optimiser's state, so neither decay nor momentum moves a weight that was not chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.adapt.contract import (  # fmt: skip
    At,
    Layer,
    Method,
    Observed,
    Params,
    Place,
    Spec,
    pattern_value,
    zeros,
)
from trimtab.adapt.observed import Gradients
from trimtab.adapt.sparse import chosen_places, shared_out
from trimtab.models.anatomy import Anatomy


@final
class SHiRA(Method):
    """``SHiRA(rank=32)``, ``SHiRA(mask="fisher", share=0.005)``; with ``seed``, random places are PEFT's."""

    kind: ClassVar[str] = "shira"
    lr: ClassVar[float] = 3e-4
    peft_type: ClassVar[str | None] = "SHIRA"
    disk: ClassVar[Mapping[str, str]] = {s: s for s in ("shira_weight", "shira_indices")}
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 32),
        "random_seed": ("seed", None),
    }
    peft_lacks: ClassVar[Mapping[str, Any]] = {"mask_type": ...}
    scales: ClassVar[str] = "v"
    short_names: ClassVar[Mapping[str, str]] = {"shira_weight": "v", "shira_indices": "places"}

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = Field(default=32, ge=1)
    """A matrix has rank · (in + out) trained values."""
    share: float | None = Field(default=None, gt=0, le=1)
    """This share of its weights instead."""
    mask: Literal["random", "magnitude", "fisher"] = "random"
    """Which weights: any, the largest, or those with the largest Fisher information."""
    seed: int | None = None
    """Of random places, in every layer alike, as PEFT draws them; empty is that of the adapter."""
    count: int | None = Field(default=None, ge=1)
    """As many values instead, in every layer."""
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    """End of a path -> its rank."""
    count_pattern: Mapping[str, int] = Field(default_factory=dict)
    """End of a path -> its number of values."""

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset({"shira_indices"})

    def observes(self, role: str) -> Gradients | None:
        return Gradients(squared=True) if self.mask == "fisher" else None

    def informed(self, observed: Mapping[str, Sequence[Observed]]) -> Self:
        """Each target gets as many values as it has among the largest of all; counts that are given stay."""
        if self.count_pattern:
            return self
        scores = {path: [o["gradient"] for o in each] for path, each in observed.items()}
        sizes = [(p, one.shape[0], one[0].numel()) for p, each in scores.items() for one in each]
        budget = sum(self.at(path)._count(out, rest) for path, out, rest in sizes)
        return self.replace(count_pattern=shared_out(scores, budget))

    def at(self, path: str) -> Self:
        rank = pattern_value(self.rank_pattern, path, self.rank)
        count = pattern_value(self.count_pattern, path, self.count)
        return self.replace(rank=rank, count=count, rank_pattern={}, count_pattern={})

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        count = self._count(*layer.matrix_shape())

        def places(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            if self.seed is not None:
                generator = torch.Generator().manual_seed(self.seed)
            return chosen_places(layer, self.mask, count, generator)

        return {
            "v": Spec("shira_weight", (count,), zeros),
            "places": Spec("shira_indices", (2, count), places, cast=False),
        }

    def _count(self, out: int, rest: int) -> int:
        if self.count is not None:
            return self.count
        if self.share is not None:
            return max(1, round(self.share * out * rest))
        return self.rank * (out + rest)

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        return at.layer.sparse(x, p["places"], p["v"])

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        return layer.dense() + layer.scattered(p["places"], p["v"]), layer.bias()

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        """All values of all parts; where two lie at one place, they add up."""
        new = {name: torch.cat([p[name] for _, p in parts], dim=-1) for name in ("v", "places")}
        methods = [method for method, _ in parts if isinstance(method, SHiRA)]
        if any(method.count or method.share for method in methods):
            return self.replace(count=new["v"].shape[-1], share=None, mask="random"), new
        return self.replace(rank=sum(method.rank for method in methods), mask="random"), new

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        by_rank = not (self.share or self.count or self.rank_pattern or self.count_pattern)
        return by_rank and all(isinstance(anatomy.modules.get(p.path), nn.Linear) for p in places)
