"""Methods that add a matrix ΔW to a weight: they say how it is made, the rest is here.

    y = f(x) + apply(x, ΔW),   ΔW_OIK in the canonical orientation of the layer

A convolution's ΔW may be given as the matrix (out, in · kernel).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Method, Params, Place, check_patterns, pattern_value
from trimtab.frozen import Layer
from trimtab.models.anatomy import Anatomy


class WeightDelta(Method):
    """A subclass says `change`; where ΔW need not be built, it overrides ``delta`` too.

    ``patterns`` names fields that map ends of paths to values -> the field whose value that is.
    """

    patterns: ClassVar[Mapping[str, str]] = {}

    targets: str | tuple[str, ...] = "all-linear"

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        places, fields = super().place(anatomy), dict(self)
        paths = [place.path for place in places]
        check_patterns(paths, *(fields[pattern] for pattern in self.patterns))
        return places

    def at(self, path: str) -> Self:
        fields = dict(self)
        if not any(fields[pattern] for pattern in self.patterns):
            return self
        own = {
            name: pattern_value(fields[p], path, fields[name]) for p, name in self.patterns.items()
        }
        return self.replace(**own, **{pattern: {} for pattern in self.patterns})

    @abstractmethod
    def change(self, p: Params, layer: Layer) -> Tensor:
        """ΔW."""

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        return at.layer.apply(x, self.change(p, at.layer).reshape(at.layer.shape))

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        return layer.dense() + self.change(p, layer).reshape(layer.shape), layer.bias()


class Lycoris(WeightDelta):
    """What LoHa and LoKr share."""

    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}

    rank: int = Field(default=8, ge=1)
    """Rank of the factors."""
    alpha: float = 8.0
    """ΔW is multiplied with alpha / rank."""
    rank_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows of ΔW that are left out, in training."""
    module_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """How often all of ΔW is left out, in training."""
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    """End of a path -> its rank."""
    alpha_pattern: Mapping[str, float] = Field(default_factory=dict)
    """End of a path -> its alpha."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if not at.training or not (self.rank_dropout or self.module_dropout):
            return super().delta(p, x, at)
        change = self.change(p, at.layer)
        rows = torch.rand(change.shape[0], device=change.device) >= self.rank_dropout
        kept = rows.to(change.dtype) * (torch.rand((), device=change.device) >= self.module_dropout)
        shape = at.layer.shape
        return at.layer.apply(x, (change * kept.view(-1, *[1] * (change.dim() - 1))).reshape(shape))


def columns(layer: Layer) -> int:
    """Columns of the weight as a matrix: input channels (of a group) times the kernel's size."""
    size = 1
    for axis in layer.shape[1:]:
        size *= axis
    return size
