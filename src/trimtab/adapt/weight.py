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
from trimtab.errors import UnsupportedError
from trimtab.frozen import Layer
from trimtab.kernels.dropout import drawn_dropout
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


class Dropping(WeightDelta):
    """Of which a share of the inputs is dropped, in training, before ΔW."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the inputs that ΔW does not see, in training."""

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        return super().delta(p, dropped(x, self.dropout, at), at)


class Lycoris(WeightDelta):
    """What LoHa and LoKr share.

    With ``tucker`` a factor of a convolution is a core T (rank, rank, kernel) between two matrices (arXiv 2108.06098):
    Σ_ij T_ij… A_ip B_jr. PEFT calls that ``use_effective_conv2d``; kernels of size 1 have none.
    """

    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}

    rank: int = Field(default=8, ge=1)
    """Rank of the factors."""
    alpha: float = 8.0
    """ΔW is multiplied with alpha / rank."""
    tucker: bool = False
    """In convolutions, a small core for the kernel between factors for the channels."""
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

    @property
    def rescales(self) -> bool:
        """Whether the rows that are left grow by as much as `rank_dropout` took away."""
        return False

    def core(self, layer: Layer) -> tuple[int, ...] | None:
        """Shape of T at a layer, or None where there is none."""
        kernel = layer.shape[2:]
        if not self.tucker or set(kernel) <= {1}:
            return None
        return (self.rank, self.rank, *kernel, *((1,) if len(kernel) == 1 else ()))  # as PEFT's

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if not at.training or not (self.rank_dropout or self.module_dropout):
            return super().delta(p, x, at)
        change = self.change(p, at.layer).reshape(at.layer.shape[0], -1)
        draw, device = at.generator(change.device), change.device
        whole = (
            torch.rand(1, device=device, generator=draw) >= self.module_dropout
        )  # first, as in PEFT
        kept = whole.to(change.dtype)
        if self.rank_dropout:
            rows = torch.rand(len(change), device=device, generator=draw) >= self.rank_dropout
            share = rows.to(change.dtype).mean().clamp_min(1 / change.shape[0])
            kept = rows * (kept / share if self.rescales else kept)
        change = change * kept[:, None]
        return at.layer.apply(x, change.reshape(at.layer.shape))

    def peft_differs(self, layer: Layer) -> str:
        """Its convolutions have groups and dilation."""
        if layer.kind != "conv":
            return super().peft_differs(layer)
        return (
            ""
            if len(layer.shape) < 5 and layer.zero_padded
            else "it pads with zeros, in two dimensions"
        )


def with_core(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij T_ij… A_ip B_jr, (p, r, …)."""
    return torch.einsum("ij...,ip,jr->pr...", t, a, b)


def dropped(x: Tensor, share: float, at: At) -> Tensor:
    """x with a share of its entries at zero and the others grown by as much, in training."""
    if not share or not at.training:
        return x
    if not x.is_floating_point():
        raise UnsupportedError(
            f"{at.path}: dropout before an embedding would drop token ids; set dropout=0 for it."
        )
    return drawn_dropout(x, share, at.generator(x.device))


def columns(layer: Layer) -> int:
    """Columns of the weight as a matrix: input channels (of a group) times the kernel's size."""
    size = 1
    for axis in layer.shape[1:]:
        size *= axis
    return size
