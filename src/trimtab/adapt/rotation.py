"""Methods that rotate what a weight acts on, W' = W Rᵀ: they say how a vector is turned, the rest is here.

    linear        y = f(x R)                 the input is turned, the weight is not touched
    convolution   y = f(x) + apply(x, W Rᵀ − W)   over the patches (in · kernel)
    embedding     y = f(x) R                 over the width

All vectors are rows; D is the width that is turned. In training some of the rotations may be left out (`kept`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.biases import Biased
from trimtab.adapt.contract import At, Params, Place
from trimtab.adapt.peft_config import read_options
from trimtab.adapt.weight import columns
from trimtab.errors import ConfigError
from trimtab.frozen import Layer


class Rotation(Biased):
    """A subclass says `turn` for rows of `width` entries."""

    targets: str | tuple[str, ...] = "all-linear"

    @abstractmethod
    def turn(self, p: Params, x: Tensor, *, back: bool) -> Tensor:
        """x R, or x Rᵀ with ``back``."""

    def kept(self, p: Params, at: At | None = None) -> Params:
        """The tensors without what is left out by chance, asked for in training only; by default all of them."""
        return p

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        return self.turn(self._used(p, at), x, back=False) if at.layer.kind == "linear" else x

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.layer.kind != "conv":
            return None
        weight_OC = at.layer.dense().to(x.dtype).flatten(1)
        change = self.turn(self._used(p, at), weight_OC, back=True) - weight_OC
        return at.layer.apply(x, change.reshape(at.layer.shape))

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return self.turn(self._used(p, at), y, back=False) if at.layer.kind == "embedding" else y

    def peft_differs(self, layer: Layer) -> str:
        if layer.kind == "conv" and not (len(layer.shape) == 4 and layer.even):
            return "it takes images alone, and one size of kernel, stride and padding for both axes"
        return super().peft_differs(layer)

    def _used(self, p: Params, at: At) -> Params:
        return self.kept(p, at) if at.training else p


class InBlocks(Rotation):
    """A rotation of blocks of the width, each by a part of Q that may be zero: then it does not turn.

    Q is (blocks, …) or (factors, blocks, …, …): as many axes are for the entries of a block.
    """

    peft_sizes: ClassVar[tuple[str, str]]
    """What PEFT calls `block` and `blocks`; the other one of the two is 0 there."""

    block: int = Field(default=4, ge=2)
    """Size of the blocks that are rotated."""
    blocks: int | None = Field(default=None, ge=1)
    """How many blocks, instead of their size."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the blocks (of one factor, where there are several), rounded down, that do not turn, in training."""

    def divided(self, layer: Layer) -> tuple[int, int]:
        """How many blocks a layer has, and their size."""
        size = blocks_of(self.kind, layer, self.blocks) if self.blocks else self.block
        return blocks_of(self.kind, layer, size), size

    def kept(self, p: Params, at: At | None = None) -> Params:
        """Multiplicative dropout (BOFT, arXiv 2311.06243): some blocks of one of the factors, chosen by chance."""
        if not self.dropout:
            return p
        q = p["Q"]
        draw = None if at is None else at.generator(q.device)
        *factors, count = q.shape[: q.dim() // 2]
        gone = torch.zeros(factors[0] if factors else 1, count, dtype=torch.bool, device=q.device)
        factor = torch.randint(gone.shape[0], (1,), device=q.device, generator=draw)
        order = torch.randperm(count, device=q.device, generator=draw)
        gone[factor] = order < int(self.dropout * count)
        return {**p, "Q": q.masked_fill(gone.view(*factors, count, *[1] * (q.dim() // 2)), 0)}

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        size, count = self.peft_sizes
        sizes = {size: 0 if self.blocks else self.block, count: self.blocks or 0}
        return super().to_peft(places) | sizes

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields of a PEFT config."""
        size, count = cls.peft_sizes
        idle = {**cls.peft_lacks, **dict.fromkeys(cls.peft_sizes, ...)}
        fields = read_options(config, cls.peft_options, idle, cls.kind)
        own = {"block": config.get(size), "blocks": config.get(count)}
        return fields | {name: value for name, value in own.items() if value}

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Self | None:
        return cls(**cls.fields_from_peft(config))


def width(layer: Layer) -> int:
    """How many entries the turned vectors of a layer have."""
    return layer.shape[0] if layer.kind == "embedding" else columns(layer)


def blocks_of(kind: str, layer: Layer, size: int) -> int:
    """How many blocks of ``size`` the width makes; an error where it does not divide."""
    wide = width(layer)
    if wide % size:
        near = [d for d in range(1, wide + 1) if wide % d == 0]
        close = sorted(near, key=lambda d: abs(d - size))[:2]
        raise ConfigError(
            f"{kind}: blocks of {size} do not divide a width of {wide}; choose for example "
            f"{' or '.join(map(str, sorted(close)))}, or leave the layer out of the targets."
        )
    return wide // size


def in_blocks(x: Tensor, blocks_NSS: Tensor) -> Tensor:
    """x times a block-diagonal matrix; one block stands for all."""
    size = blocks_NSS.shape[-1]
    parts = x.unflatten(-1, (-1, size))
    return torch.einsum(
        "...ns,nsk->...nk", parts, blocks_NSS.expand(parts.shape[-2], -1, -1)
    ).flatten(-2)


def wide(master: Tensor, x: Tensor) -> Tensor:
    """A master as rotations are computed from it: not in half precision, which would not be orthogonal."""
    return master.to(torch.promote_types(master.dtype, x.dtype))


def cayley(skew: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹, which is orthogonal for every skew-symmetric Q."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)
