"""HRA (Yuan et al. 2024, arXiv 2405.17484): a chain of Householder reflections of the input.

    y = f(x H),   H = H_r … H_1,   H_i = I − 2 u_i u_iᵀ / ‖u_i‖²

The u start in equal pairs, whose reflections cancel, so an even rank starts at the identity. ``orthogonal`` makes
them orthogonal to each other by Gram and Schmidt; equal pairs would then vanish, so it starts elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import Layer, Params, Spec, kaiming_uniform
from trimtab.adapt.rotation import Rotation, wide, width


@final
class HRA(Rotation):
    """``HRA(rank=8)``."""

    kind: ClassVar[str] = "hra"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "HRA"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 8), "apply_GS": ("orthogonal", False),
    }  # fmt: skip
    disk: ClassVar[Mapping[str, str]] = {"hra_u": "hra_u"}
    short_names: ClassVar[Mapping[str, str]] = {"hra_u": "u"}

    rank: int = Field(default=8, ge=1)
    """How many reflections."""
    orthogonal: bool = False
    """Make the u orthogonal to each other."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        first = kaiming_uniform if self.orthogonal else _in_pairs
        return {"u": Spec("hra_u", (width(layer), self.rank), first, cast=False)}

    def turn(self, p: Params, x: Tensor, *, back: bool) -> Tensor:
        if self.orthogonal:
            u = _orthonormal(wide(p["u"], x)).to(x.dtype)
            return x - 2 * (x @ u) @ u.T
        vectors = F.normalize(wide(p["u"], x), dim=0).to(x.dtype).unbind(1)
        for u in vectors if back else reversed(vectors):
            x = x - 2 * (x @ u)[..., None] * u
        return x


def _in_pairs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if shape[1] % 2:
        return kaiming_uniform(shape, generator)
    return kaiming_uniform((shape[0], shape[1] // 2), generator).repeat_interleave(2, dim=1)


def _orthonormal(u: Tensor) -> Tensor:
    """Gram and Schmidt, column by column."""
    found: list[Tensor] = []
    for column in u.unbind(1):
        for other in found:
            column = column - (other @ column) * other
        found.append(column / column.norm())
    return torch.stack(found, dim=1)
