"""SpotTune (Guo et al. 2019, arXiv 1811.08737), parameter-efficiently: each example decides, block by block,
whether it takes the frozen block or the adapted one.

    y = f(x) + g_l · edit_l(x),   g = one_hot argmax( policy(mean of the prompt's embeddings) ),  g_l ∈ {0, 1}

The adapted block is the frozen one with an inner method (LoRA by default); all edits of a block share
its gate. In training the choice is sampled with Gumbel noise and passes its gradient straight through; at
evaluation it is the argmax, and rows that take the frozen block skip the inner method. The policy starts
open (P(adapt) = 0.88). With ``blocks=k``, at most k blocks should be adapted over the batch (the paper's
global policy): two auxiliary losses see to it, with z_l the share of examples that adapt block l,

    (Σ z_l − k)²   and   −Σ z_l log z_l.

A running average of z is kept: `trimtab.settled` makes of it the inner method in the k blocks used most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Method, Params, Place, Spec, normal, ones, zeros
from trimtab.adapt.gating import Gating, once, straight_through
from trimtab.errors import RouteError, UnsupportedError
from trimtab.models.anatomy import Anatomy

POLICY = "policy"
USAGE = "policy.usage"


@final
class SpotTune(Gating):
    """``SpotTune(inner="lora(rank=8)")``; ``hidden`` is the width of the policy network."""

    kind: ClassVar[str] = "spottune"
    why_not_affine: ClassVar[str] = (
        "each example chooses its own blocks, so no one weight serves all"
    )
    lr: ClassVar[float] = 5e-4
    skips: ClassVar[bool] = True
    short_names: ClassVar[Mapping[str, str]] = {
        "policy.norm.weight": "gate_norm", "policy.down.weight": "gate_down", "policy.down.bias": "gate_b_down",
        "policy.up.weight": "gate_up", "policy.up.bias": "gate_b_up", USAGE: "gate_usage",
    }  # fmt: skip

    hidden: int = Field(default=64, ge=1)
    temperature: float = Field(default=5.0, gt=0)
    blocks: int | None = Field(default=None, ge=1)
    budget_weight: float = Field(default=0.01, ge=0)

    @property
    def default_lr(self) -> float:
        return self.lr

    @property
    def fixed(self) -> frozenset[str]:
        return super().fixed | {USAGE}

    def edits(self, role: str) -> bool:
        return role != POLICY

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        places = [p for p in super().place(anatomy) if anatomy.block_of(p.path) is not None]
        if not places or not anatomy.role("input_embedding"):
            raise UnsupportedError(
                "SpotTune needs a transformer with blocks and an input embedding that Trimtab knows: its policy "
                "reads the embeddings and decides block by block."
            )
        return [*(Place(path, POLICY) for path in anatomy.role("input_embedding")), *places]

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        width, count = anatomy.width, len(anatomy.blocks)
        return {
            **super().shared(anatomy, places),
            "gate_norm": Spec("policy.norm.weight", (width,), ones),
            "gate_down": Spec("policy.down.weight", (self.hidden, width), normal(width**-0.5)),
            "gate_b_down": Spec("policy.down.bias", (self.hidden,), zeros),
            "gate_up": Spec("policy.up.weight", (2 * count, self.hidden), zeros),
            "gate_b_up": Spec("policy.up.bias", (2 * count,), _open),
            "gate_usage": Spec(USAGE, (count,), ones, cast=False),
        }

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        if at.role == POLICY:
            once(at, POLICY, lambda: self._chosen(y, at))
        return super().leave(p, y, at)

    def decide(self, p: Params, value: Tensor, at: At) -> Tensor:
        gates_UL = at.memory.get((at.name, at.part.owner, POLICY))
        if gates_UL is None:
            raise RouteError(
                f"adapter {at.name!r}: a block is reached before the policy has seen the prompt. Run the model from "
                "its input embeddings (and generate with a cache that began with the prompt)."
            )
        return cast(Tensor, gates_UL)[:, cast(int, at.block)]

    def _chosen(self, y: Tensor, at: At) -> Tensor:
        """Each unit's blocks, from the prompt's embeddings: gates_UL."""
        s = at.shared
        x_UC = F.layer_norm(at.pool(y.detach()), s["gate_norm"].shape, s["gate_norm"])
        hidden = F.gelu(F.linear(x_UC, s["gate_down"], s["gate_b_down"]))
        logits_UL2 = F.linear(hidden, s["gate_up"], s["gate_b_up"]).float().unflatten(1, (-1, 2))
        if not at.training:
            return (logits_UL2[..., 1] > logits_UL2[..., 0]).float()
        noise = -torch.empty_like(logits_UL2).exponential_().log()
        gates = straight_through(((logits_UL2 + noise) / self.temperature).softmax(-1)[..., 1])
        z_L = gates[at.part.members(gates.device)].mean(0)
        with torch.no_grad():
            s["gate_usage"].lerp_(z_L.to(s["gate_usage"].dtype), 0.01)
        if self.blocks is not None:
            at.add_loss("blocks", self.budget_weight * (z_L.sum() - self.blocks) ** 2)
            at.add_loss("entropy", -self.budget_weight * (z_L * z_L.clamp_min(1e-6).log()).sum())
        return gates

    def settled(self, shared: Params) -> Method:
        """The inner method in the ``blocks`` that examples use most; or in those that most examples use."""
        usage, inner = shared["gate_usage"], cast(Method, self.inner)
        there = (
            range(len(usage)) if inner.layers is None else [i % len(usage) for i in inner.layers]
        )
        ranked = sorted(there, key=lambda block: -float(usage[block]))
        used = [block for block in ranked if float(usage[block]) > 0.5]
        kept = ranked[: self.blocks] if self.blocks is not None else used or ranked[:1]
        return inner.replace(layers=tuple(sorted(kept)), train=self.train)


def _open(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Logits (0, 2) for every block: P(adapt) = 0.88."""
    return torch.tensor([0.0, 2.0]).repeat(shape[0] // 2)
