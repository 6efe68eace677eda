"""OFT (Qiu et al. 2023, arXiv 2306.07280): orthogonal rotation of the input, block by block.

    y = f(x R),   R = diag(R_1 … R_k),   R_i = (I + Q_i)(I − Q_i)⁻¹,   Q_i skew-symmetric, zero at first

``neumann`` takes the first terms of that series, I + 2Q + 2Q² + 2Q³ + Q⁴, as PEFT does by default; ``inverse`` is
the exact form that PEFT computes without it, which turns the other way: (I − Q)(I + Q)⁻¹.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import Layer, Params, Place, Progress, Sites, Spec, zeros
from trimtab.adapt.peft_config import read_options
from trimtab.adapt.rotation import Rotation, blocks_of, cayley, in_blocks, wide


@final
class OFT(Rotation):
    """``OFT(block=32)``, or a number of blocks: ``OFT(blocks=8)``; ``epsilon`` bounds each Q (constrained OFT)."""

    kind: ClassVar[str] = "oft"
    lr: ClassVar[float] = 4e-4
    peft_type: ClassVar[str | None] = "OFT"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("blocks", 0), "oft_block_size": ("block", 32), "block_share": ("share", False),
    }  # fmt: skip
    peft_lacks: ClassVar[Mapping[str, Any]] = {
        "module_dropout": 0.0, "coft": False, "eps": ..., "use_cayley_neumann": ..., "num_cayley_neumann_terms": 5,
    }  # fmt: skip
    disk: ClassVar[Mapping[str, str]] = {"oft_R.weight": "oft_R.weight"}
    short_names: ClassVar[Mapping[str, str]] = {"oft_R.weight": "Q"}

    block: int = Field(default=32, ge=2)
    """Size of the blocks that are rotated."""
    blocks: int | None = Field(default=None, ge=1)
    """How many blocks, instead of their size."""
    share: bool = False
    """One rotation for all blocks."""
    series: Literal["neumann", "exact", "inverse"] = "neumann"
    """How R is made from Q."""
    epsilon: float | None = Field(default=None, gt=0)
    """Keep each Q in a ball of this radius over √blocks (constrained OFT)."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        size = blocks_of(self.kind, layer, self.blocks) if self.blocks else self.block
        count = 1 if self.share else blocks_of(self.kind, layer, size)
        return {"Q": Spec("oft_R.weight", (count, size * (size - 1) // 2), zeros, cast=False)}

    def turn(self, p: Params, x: Tensor, *, back: bool) -> Tensor:
        q = _skew(wide(p["Q"], x))
        if self.series == "neumann":
            square = q @ q
            eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
            r = eye + 2 * q + 2 * square + 2 * square @ q + square @ square
        else:
            r = cayley(q if self.series == "inverse" else -q)
        return in_blocks(x, (r.mT if back else r).to(x.dtype))

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        """Constrained OFT: pull each Q back into a ball around zero."""
        if self.epsilon is None:
            return
        for params in sites.values():
            q = params["Q"]
            most = self.epsilon * q.shape[-2] ** -0.5
            norms = q.norm(dim=-1, keepdim=True) * 2**0.5  # both triangles
            q.mul_((most / norms.clamp_min(1e-30)).clamp_max(1))

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {
            "r": self.blocks or 0,
            "oft_block_size": 0 if self.blocks else self.block,
            "block_share": self.share,
            "use_cayley_neumann": self.series == "neumann",
            "peft_version": "0.18.0",  # earlier releases had another series
        }

    def in_peft(self, anatomy: Any, places: Sequence[Place]) -> bool:
        return self.series != "exact" and super().in_peft(anatomy, places)

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> OFT | None:
        fields = read_options(config, cls.peft_options, cls.peft_lacks, cls.kind)
        series = "neumann" if config.get("use_cayley_neumann", True) else "inverse"
        sizes = {"blocks": fields["blocks"] or None, "block": fields["block"] or 32}
        return cls(**fields | sizes | {"series": series})


def _skew(upper: Tensor) -> Tensor:
    """(…, S(S−1)/2) upper triangles -> (…, S, S) skew-symmetric."""
    size = int((1 + (1 + 8 * upper.shape[-1]) ** 0.5) / 2)
    rows, cols = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], size * size)
    full = flat.index_add(-1, rows * size + cols, upper).unflatten(-1, (size, size))
    return full - full.mT
