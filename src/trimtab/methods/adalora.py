"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): low-rank factors whose ranks are shared out among the sites.

    y = W x + s · B diag(E) A x,   s = alpha / (rank + 1e-5)

All sites begin with ``rank`` components. After each step the least important ones have their E set to zero, until
``target_rank`` are left per site on average (`trimtab.adapt.budget`). A loss λ · mean ‖PPᵀ − I‖ over all A and Bᵀ
keeps components apart. As in PEFT, s stays what it was at first. What is shared is a LoRA of the ranks left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, final

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from trimtab.adapt.budget import Budget, surviving, trimmed
from trimtab.adapt.contract import (
    At,
    Layer,
    Method,
    Params,
    Place,
    Progress,
    Sites,
    Spec,
    normal,
    pattern_value,
    zeros,
)
from trimtab.adapt.initial import DEFAULT
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.parse import method_from
from trimtab.models.anatomy import Anatomy

EPS = 1e-5
PEFT = {
    "rank": "init_r", "target_rank": "target_r", "tinit": "tinit", "tfinal": "tfinal", "every": "deltaT",
    "beta1": "beta1", "beta2": "beta2", "orthogonal": "orth_reg_weight",
}  # fmt: skip
"""What PEFT calls our fields."""
ELSEWHERE = {"total_step", "rank_pattern", "alpha_pattern", "use_rslora"}
"""Read here or not at all: PEFT's AdaLoRA passes over the last two."""
OWN = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}


@final
class AdaLoRA(LowRank):
    """``AdaLoRA(rank=12, target_rank=8, tinit=100, tfinal=200)``."""

    kind: ClassVar[str] = "adalora"
    lr: ClassVar[float] = 1e-3  # E starts at zero, between two small factors
    peft_type: ClassVar[str | None] = "ADALORA"
    offsets: ClassVar[bool] = False
    disk: ClassVar[Mapping[str, str]] = {**LowRank.disk, **{slot: slot for slot in OWN}}
    short_names: ClassVar[Mapping[str, str]] = {**LowRank.short_names, **OWN}

    rank: int = Field(default=12, ge=0)
    """Components of each site at first."""
    target_rank: int = Field(default=8, ge=0)
    """Components that are left in the end, per site on average."""
    tinit: int = Field(default=0, ge=0)
    """Steps before the first cut."""
    tfinal: int = Field(default=0, ge=0)
    """Steps after the last cut."""
    every: int = Field(default=1, ge=1)
    """Steps from one cut to the next."""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the mean of |p · gradient|."""
    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Decay of how far it strays from that mean."""
    orthogonal: float = Field(default=0.5, ge=0)
    """λ, the weight of the loss that keeps components apart."""

    @field_validator("rank_pattern")
    @classmethod
    def _ranks(cls, value: Mapping[str, int]) -> Mapping[str, int]:
        return value  # what a trimmed file has left, which may be nothing

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.rslora:
            raise ValueError("adalora has no rslora")
        if self.init != DEFAULT:
            raise ValueError("adalora begins in its own way and has no other init")
        if self.target_rank > self.rank:
            raise ValueError("target_rank is what is left of rank, so it cannot be more")
        return self

    @property
    def scaling(self) -> float:
        return float(self.alpha / (self.rank + EPS))

    def at(self, path: str) -> Self:
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank = pattern_value(self.rank_pattern, path, self.rank)
        alpha = pattern_value(self.alpha_pattern, path, self.scaling * (rank + EPS))
        here = {"rank": rank, "alpha": alpha, "target_rank": min(rank, self.target_rank)}
        return self.replace(**here, rank_pattern={}, alpha_pattern={})

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs = super().tensors(layer, role)
        if role in BIASES:
            return specs
        small = {
            short: Spec(spec.name.removesuffix(".weight"), spec.shape, normal(0.02))
            for short, spec in specs.items()
        }
        return {**small, "E": Spec("lora_E", (self.rank, 1), zeros)}

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        e = p["E"]
        e = e.reshape(*e.shape[:-1], *(1,) * (p["A"].dim() - e.dim() + 1))  # beside any kernel
        return p["A"] * e, p["B"] * self.scaling

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.training and self.orthogonal and at.role not in BIASES:
            a, b = (at.layer.wide(p[part]).flatten(1) for part in "AB")
            apart = [(g - torch.eye(len(g)).to(g)).norm() for g in (a @ a.T, b.T @ b)]
            # of a mixture's experts, each that was chosen counts as a site
            at.add_loss("orthogonality", self.orthogonal * sum(apart) / (2 * at.count))
        return super().delta(p, x, at)

    @property
    def budget(self) -> Budget:
        """The schedule of the ranks."""
        return Budget(self.target_rank, self.tinit, self.tfinal, self.every, self.beta1, self.beta2)

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        here = {place.path: p for place, p in sites.items() if place.role not in BIASES}
        self.budget.after_step(here, memory, progress)

    # -- the form to share, arithmetic, PEFT -----------------------------------------------------------

    @property
    def peft_reads(self) -> bool:
        return True  # as AdaLoRA; its plain form is a LoRA

    def plain(self) -> Method:
        rank = max(self.rank, 1)
        same = {k: v for k, v in self if k in ("targets", "exclude", "layers", "train", "bias")}
        return method_from({"kind": "lora", "rank": rank, "alpha": rank, **same})

    def plain_for(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Method:
        ranks = {
            path: len(surviving(self._params(slots)))
            for path, slots in tensors.items()
            if "lora_E" in slots
        }
        most = max(ranks.values())
        fewer = {f"^{path}": rank for path, rank in ranks.items() if rank < most}
        return self.plain().replace(rank=most, alpha=most, rank_pattern=fewer, alpha_pattern=fewer)

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        if "lora_E" not in tensors:
            return dict(tensors)
        p = self._params(tensors)
        a, b = trimmed(*self.factors(p), p)
        new = {**p, "A": a, "B": b}
        return {
            f"{slot}.weight" if slot in OWN else slot: new[self.short_names[slot]]
            for slot in tensors
            if slot != "lora_E"
        }

    def _params(self, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.short_names[slot]: tensor for slot, tensor in slots.items()}

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        found = super().scaled(p, weight, role)
        return found if role in BIASES else {**found, "E": p["E"]}

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        method, found = super().sum(parts, role)  # E is folded into A, every scale into B
        if role in BIASES or not isinstance(method, AdaLoRA):
            return method, found
        e = parts[0][1]["E"]
        ones = e.new_ones(*e.shape[:-2], method.rank, 1)
        return method.replace(alpha=method.rank + EPS), {**found, "E": ones}

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        """PEFT has no embeddings, flattens the factors of a convolution, and has one alpha for all."""
        others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        found = (anatomy.modules.get(path) for path in self.wrapped(places))
        return not self.alpha_pattern and not any(isinstance(layer, others) for layer in found)

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        left = {
            f"{path}.lora_E": [number < self.at(path).rank for number in range(self.rank)]
            for path in self.wrapped(places)
        }
        return {
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": self.bias,
            **{PEFT[name]: value for name, value in self if name in PEFT},
            # PEFT wants a number to load it, too; it is of training only
            "total_step": self.tinit + self.tfinal + 1,
            "rank_pattern": left if self.rank_pattern else None,
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> AdaLoRA | None:
        own = {*PEFT.values(), *ELSEWHERE}
        fields = cls.fields_from_peft({k: v for k, v in config.items() if k not in own})
        fields |= {ours: config[theirs] for ours, theirs in PEFT.items() if theirs in config}
        ranks = config.get("rank_pattern") or {}
        left = {f"^{key.removesuffix('.lora_E')}": sum(mask) for key, mask in ranks.items()}
        if fields["alpha"] <= 0:
            fields["alpha"] = float(config["init_r"])
        return cls(**{**fields, "rank_pattern": left})
