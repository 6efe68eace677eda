"""OFT (Qiu et al. 2023, arXiv 2306.07280): orthogonal rotation of the input, block by block.

    y = f(x R),   R = diag(R_1 … R_k),   R_i = (I + Q_i)(I − Q_i)⁻¹,   Q_i skew-symmetric, zero at first

``neumann`` takes the first terms of that series, I + 2Q + 2Q² + 2Q³ + Q⁴, as PEFT does by default; ``inverse`` is
the exact form that PEFT computes without it, which turns the other way: (I − Q)(I + Q)⁻¹. With ``epsilon`` each Q is
pulled back into a ball around zero wherever it is used, and after each step; gradients are those at that point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import Layer, Params, Place, Progress, Sites, Spec, zeros
from trimtab.adapt.rotation import InBlocks, cayley, in_blocks, wide

SLOTS = {"linear": "oft_R.weight", "conv": "oft_R.weight", "embedding": "oft_embedding_R.weight"}


@final
class OFT(InBlocks):
    """``OFT(block=32)``, or a number of blocks: ``OFT(blocks=8)``; ``epsilon`` bounds each Q (constrained OFT)."""

    kind: ClassVar[str] = "oft"
    lr: ClassVar[float] = 4e-4
    peft_type: ClassVar[str | None] = "OFT"
    peft_kinds: ClassVar[tuple[str, ...]] = tuple(SLOTS)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "block_share": ("share", False), "num_cayley_neumann_terms": ("terms", 5), "module_dropout": ("dropout", 0.0),
    }  # fmt: skip
    peft_sizes: ClassVar[tuple[str, str]] = ("oft_block_size", "r")
    peft_lacks: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("coft", "eps", "use_cayley_neumann"), ...
    )
    disk: ClassVar[Mapping[str, str]] = {slot: slot for slot in SLOTS.values()}
    short_names: ClassVar[Mapping[str, str]] = dict.fromkeys(SLOTS.values(), "Q")

    block: int = Field(default=32, ge=2)
    """Size of the blocks that are rotated."""
    share: bool = False
    """One rotation for all blocks."""
    series: Literal["neumann", "exact", "inverse"] = "neumann"
    """How R is made from Q."""
    terms: int = Field(default=5, ge=2)
    """Terms of `neumann`; 4 of them are the same as 3, as in PEFT."""
    epsilon: float | None = Field(default=None, gt=0)
    """Keep each Q in a ball of this radius over √blocks (constrained OFT)."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        count, size = self.divided(layer)
        shape = (1 if self.share else count, size * (size - 1) // 2)
        return {"Q": Spec(SLOTS.get(layer.kind, SLOTS["linear"]), shape, zeros, cast=False)}

    def turn(self, p: Params, x: Tensor, *, back: bool) -> Tensor:
        q = wide(p["Q"], x)
        if self.epsilon is not None:
            q = _bounded(q.detach(), self.epsilon) + (q - q.detach())
        q = _skew(q)
        exact = self.series != "neumann"
        r = cayley(q if self.series == "inverse" else -q) if exact else _neumann(q, self.terms)
        return in_blocks(x, (r.mT if back else r).to(x.dtype))

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        """Constrained OFT: pull each Q back into a ball around zero."""
        if self.epsilon is not None:
            for params in sites.values():
                params["Q"].copy_(_bounded(params["Q"], self.epsilon))

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        coft = {} if self.epsilon is None else {"coft": True, "eps": self.epsilon}
        return {
            **super().to_peft(places),
            **coft,
            "use_cayley_neumann": self.series == "neumann",
            "peft_version": "0.18.0",  # earlier releases had another series
        }

    def in_peft(self, anatomy: Any, places: Sequence[Place]) -> bool:
        return self.series != "exact" and super().in_peft(anatomy, places)

    def peft_differs(self, layer: Layer) -> str:
        if layer.kind == "conv" and set(layer.shape[2:]) != {1}:
            return (
                "it cuts an image into patches, turns them, and puts their entries back at other places, so that it "
                "does nothing of use with a kernel larger than 1 until it is merged"
            )
        return super().peft_differs(layer)

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> OFT | None:
        neumann = config.get("use_cayley_neumann", True)
        return cls(
            **cls.fields_from_peft(config),
            series="neumann" if neumann else "inverse",
            epsilon=config.get("eps", 6e-5) if config.get("coft") else None,
        )


def _bounded(q: Tensor, epsilon: float) -> Tensor:
    """Upper triangles (N, T), each pulled back into a ball of radius ε / √N, by the norm of both triangles."""
    norms = q.norm(dim=-1, keepdim=True) * 2**0.5
    return q * (epsilon * q.shape[-2] ** -0.5 / norms.clamp_min(1e-30)).clamp_max(1)


def _neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Qᵗ, t one below the number of terms; I + 2Q for two, and t = 3 for three too (as PEFT)."""
    r = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) + 2 * q
    if terms == 2:
        return r
    power = q @ q
    r = r + 2 * power
    for _ in range(3, terms - 1):
        power = power @ q
        r = r + 2 * power
    return r + power @ q


def _skew(upper: Tensor) -> Tensor:
    """(…, S(S−1)/2) upper triangles -> (…, S, S) skew-symmetric."""
    size = int((1 + (1 + 8 * upper.shape[-1]) ** 0.5) / 2)
    rows, cols = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], size * size)
    full = flat.index_add(-1, rows * size + cols, upper).unflatten(-1, (size, size))
    return full - full.mT
