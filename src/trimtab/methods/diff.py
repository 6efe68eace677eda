"""Diff pruning (Guo et al. 2021, arXiv 2012.07463): a difference to the weights that learns to be sparse.

    W' = W + z ⊙ z_g ⊙ w,   z = clamp(σ(log u − log(1 − u) + α) · 3 − 1.5, 0, 1),   u uniform

z is a gate for each weight and z_g one for the whole matrix (hard concrete; at evaluation u = ½). The expected
number of open gates, Σ σ(α + α_g), is an auxiliary loss. After ``prune_at`` of the run only the largest ``keep`` of all
differences stay, with fixed gates, and training goes on for them. Training holds two more values for each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Progress, Sites, Spec, constant, zeros
from trimtab.adapt.weight import WeightDelta, columns
from trimtab.errors import ConfigError

LEFT, RIGHT = -1.5, 1.5
SOFT = -1.0
"""The value of a gate that is still learnt."""


@final
class DiffPruning(WeightDelta):
    """``DiffPruning(keep=0.005)``: half a percent of the weights in the end."""

    kind: ClassVar[str] = "diff"
    lr: ClassVar[float] = 1e-4
    short_names: ClassVar[Mapping[str, str]] = {
        "diff_w": "w", "diff_alpha": "alpha", "diff_group": "group", "diff_gates": "gates",
    }  # fmt: skip

    keep: float = Field(default=0.005, gt=0, le=1)
    """The share of all differences that stay in the end."""
    prune_at: float = Field(default=0.7, gt=0, le=1)
    """When all others go, as a share of the run."""
    penalty: float = Field(default=1.25e-7, ge=0)
    """Weight of the expected number of open gates in the loss."""
    gate_rate: float = Field(default=1e3, gt=0)
    """Factor on the learning rate of the gates, which are logits."""

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset({"diff_gates"})

    @property
    def rates(self) -> Mapping[str, float]:
        return {"diff_alpha": self.gate_rate, "diff_group": self.gate_rate}

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        shape = (layer.shape[0], columns(layer))
        return {
            "w": Spec("diff_w", shape, zeros),
            "alpha": Spec("diff_alpha", shape, constant(5.0)),
            "group": Spec("diff_group", (1,), constant(5.0)),
            "gates": Spec("diff_gates", shape, constant(SOFT)),
        }

    def change(self, p: Params, layer: Layer) -> Tensor:
        return p["w"] * _gates(p, 0, 0)

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if not at.training:
            return super().delta(p, x, at)
        soft = (p["gates"] == SOFT).to(p["alpha"].dtype)
        at.add_loss("open", self.penalty * (torch.sigmoid(p["alpha"] + p["group"]) * soft).sum())
        draw = at.generator(p["alpha"].device)
        change = p["w"] * _gates(p, _noise(p["alpha"], draw), _noise(p["group"], draw))
        return at.layer.apply(x, change.reshape(at.layer.shape))

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        """At its time: fix the gates of the largest differences open, and all others shut."""
        if progress.total is None:
            raise ConfigError(
                "diff pruning must know how many steps there will be: give Stepper (or AdamParams) a total."
            )
        if progress.step != max(round(self.prune_at * progress.total), 1):
            return
        sizes = [(p["w"] * _gates(p, 0, 0)).abs() for p in sites.values()]
        whole = torch.cat([size.flatten() for size in sizes])
        count = max(round(self.keep * len(whole)), 1)
        least = whole.kthvalue(len(whole) - count + 1).values
        for size, p in zip(sizes, sites.values(), strict=True):
            open_ = (size >= least) & (size > 0)
            p["w"].copy_(p["w"] * _gates(p, 0, 0) * open_)
            p["gates"].copy_(open_)


def _gates(p: Params, u: Tensor | int, u_group: Tensor | int) -> Tensor:
    """The gates z ⊙ z_g for these logits of noise, or the fixed ones."""
    z = _stretched(p["alpha"] + u) * _stretched(p["group"] + u_group)
    return torch.where(p["gates"] == SOFT, z, p["gates"])


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (RIGHT - LEFT) + LEFT).clamp(0, 1)


def _noise(like: Tensor, draw: torch.Generator | None) -> Tensor:
    u = torch.rand(like.shape, generator=draw, dtype=like.dtype, device=like.device)
    u = u.clamp(1e-4, 1 - 1e-4)
    return u.log() - (1 - u).log()
