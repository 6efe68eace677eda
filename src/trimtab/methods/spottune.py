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
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Method, Params, Place, Spec
from trimtab.adapt.gating import Gating, most_used, once
from trimtab.adapt.policy import SHORT_NAMES, USAGE, chosen, policy_specs
from trimtab.errors import RouteError, UnsupportedError
from trimtab.models.anatomy import Anatomy

POLICY = "policy"


@final
class SpotTune(Gating):
    """``SpotTune(inner="lora(rank=8)")``; ``hidden`` is the width of the policy network."""

    kind: ClassVar[str] = "spottune"
    why_not_affine: ClassVar[str] = (
        "each example chooses its own blocks, so no one weight serves all"
    )
    lr: ClassVar[float] = 5e-4
    skips: ClassVar[bool] = True
    short_names: ClassVar[Mapping[str, str]] = SHORT_NAMES

    hidden: int = Field(default=64, ge=1)
    """Width of the policy network."""
    temperature: float = Field(default=5.0, gt=0)
    """Of the sampled choice in training."""
    blocks: int | None = Field(default=None, ge=1)
    """Adapt at most so many blocks over a batch."""
    budget_weight: float = Field(default=0.01, ge=0)
    """Weight of the two losses that keep to ``blocks``."""

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
        inputs = anatomy.inputs_of([place.path for place in places])
        if not places or not inputs:
            raise UnsupportedError(
                "SpotTune needs a transformer with blocks and one input embedding that Trimtab knows: its policy "
                "reads the embeddings and decides block by block. Of a model with two towers, target one."
            )
        return [*(Place(path, POLICY) for path in inputs), *places]

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        width = anatomy.width_at(places[0].path)
        policy = policy_specs(width, self.hidden, len(anatomy.blocks))
        return {**super().shared(anatomy, places), **policy}

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
        gates = chosen(y, at, self.temperature)
        if not at.training:
            return gates
        z_L = gates[at.part.members(gates.device)].mean(0)
        with torch.no_grad():
            usage = at.shared["gate_usage"]
            usage.lerp_(z_L.to(usage.dtype), 0.01)
        if self.blocks is not None:
            at.add_loss("blocks", self.budget_weight * (z_L.sum() - self.blocks) ** 2)
            at.add_loss("entropy", -self.budget_weight * (z_L * z_L.clamp_min(1e-6).log()).sum())
        return gates

    def settled(self, shared: Params) -> Method:
        """The inner method in the ``blocks`` that examples use most; or in those that most examples use."""
        inner = cast(Method, self.inner)
        kept = most_used(shared["gate_usage"], self.blocks, inner.layers)
        return inner.replace(layers=kept, train=self.train)
