"""BOFT (Liu et al. 2024, arXiv 2311.06243): a product of sparse rotations in butterfly order, and output scales.

    y − b = s ⊙ (f(x R) − b),   R = M_m … M_1,   M_i = P_i diag(R_1 … R_k) P_iᵀ,   R_j = (I − Q_j)(I + Q_j)⁻¹

P_i brings together entries that are 2^i blocks apart, so m factors mix blocks of 2^m. Q starts at zero, s at one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Spec, ones, zeros
from trimtab.adapt.rotation import InBlocks, cayley, in_blocks, wide
from trimtab.errors import ConfigError


@final
class BOFT(InBlocks):
    """``BOFT(block=4, factors=1)``, or a number of blocks: ``BOFT(blocks=8)``."""

    kind: ClassVar[str] = "boft"
    lr: ClassVar[float] = 4e-4
    peft_type: ClassVar[str | None] = "BOFT"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "boft_n_butterfly_factor": ("factors", 1), "boft_dropout": ("dropout", 0.0),
    }  # fmt: skip
    peft_sizes: ClassVar[tuple[str, str]] = ("boft_block_size", "boft_block_num")
    disk: ClassVar[Mapping[str, str]] = {"boft_R": "boft_R", "boft_s": "boft_s"}
    short_names: ClassVar[Mapping[str, str]] = {"boft_R": "Q", "boft_s": "s"}

    factors: int = Field(default=1, ge=1)
    """How many butterfly factors are multiplied."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        count, size = self.divided(layer)
        if self.factors > 1 and (size % 2 or count % 2 ** (self.factors - 1)):
            raise ConfigError(
                f"boft: {self.factors} factors need blocks of even size, and a number of them that "
                f"2^{self.factors - 1} divides; a layer of shape {layer.shape} has {count} blocks of {size}."
            )
        scales = (1, layer.shape[0]) if layer.kind == "conv" else (layer.shape[0], 1)  # as PEFT's
        return {
            "Q": Spec("boft_R", (self.factors, count, size, size), zeros, cast=False),
            "s": Spec("boft_s", scales, ones),
        }

    def turn(self, p: Params, x: Tensor, *, back: bool) -> Tensor:
        q = wide(p["Q"], x)
        rotations = cayley((q - q.mT) / 2).to(x.dtype)
        order = range(self.factors) if back else reversed(range(self.factors))
        for i in order:
            there = _order(i, x, q)
            turned = in_blocks(x[..., there.argsort()], rotations[i].mT if back else rotations[i])
            x = turned[..., there]
        return x

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        y = super().leave(p, y, at)
        scale, bias = at.layer.over_out(p["s"].flatten()), at.layer.bias()
        if bias is None:
            return y * scale
        shift = at.layer.over_out(bias.to(y.dtype))
        return shift + scale * (y - shift)


def _order(i: int, x: Tensor, q_MNSS: Tensor) -> Tensor:
    """The permutation of factor i: within each group, even half-blocks first, then odd ones."""
    places = torch.arange(x.shape[-1], device=x.device)
    factors, count, size, _ = q_MNSS.shape
    if factors == 1:
        return places
    return places.view(count // 2**i, -1, 2, size // 2).transpose(1, 2).flatten()
