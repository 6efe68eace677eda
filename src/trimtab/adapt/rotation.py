"""Methods that rotate what a weight acts on, W' = W Rᵀ: they say how a vector is turned, the rest is here.

    linear        y = f(x R)                 the input is turned, the weight is not touched
    convolution   y = f(x) + apply(x, W Rᵀ − W)   over the patches (in · kernel)
    embedding     y = f(x) R                 over the width

All vectors are rows; D is the width that is turned.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from trimtab.adapt.contract import At, Method, Params
from trimtab.adapt.weight import columns
from trimtab.errors import ConfigError
from trimtab.frozen import Layer


class Rotation(Method):
    """A subclass says `turn` for rows of `width` entries."""

    targets: str | tuple[str, ...] = "all-linear"

    @abstractmethod
    def turn(self, p: Params, x: Tensor, *, back: bool) -> Tensor:
        """x R, or x Rᵀ with ``back``."""

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        return self.turn(p, x, back=False) if at.layer.kind == "linear" else x

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.layer.kind != "conv":
            return None
        weight_OC = at.layer.dense().to(x.dtype).flatten(1)
        change = self.turn(p, weight_OC, back=True) - weight_OC
        return at.layer.apply(x, change.reshape(at.layer.shape))

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return self.turn(p, y, back=False) if at.layer.kind == "embedding" else y


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
