"""SpotTune (Guo et al. 2019, arXiv 1811.08737), parameter-efficiently: each example decides, block by block,
whether it takes the frozen block or the adapted one.

    y = f(x) + g_l · edit_l(x),   g = one_hot argmax( policy(mean of the prompt's embeddings) ),  g_l ∈ {0, 1}

The adapted block is the frozen one with an inner method (LoRA by default); all edits of a block share
its gate. In training the choice is sampled with Gumbel noise and passes its gradient straight through; at
evaluation it is the argmax, and rows that take the frozen block skip the inner method. The policy starts
open (P(adapt) = 0.88). With ``blocks=k``, at most k blocks should be adapted over the batch (the paper's
global policy): two auxiliary losses see to it, with z_l the share of examples that adapt block l,

    (Σ z_l − k)²   and   −Σ z_l log z_l.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast, final

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from trimtab.adapt.contract import (
    At,
    Layer,
    Method,
    Observation,
    Observed,
    Params,
    Place,
    Spec,
    normal,
    ones,
    zeros,
)
from trimtab.adapt.parse import method_from
from trimtab.errors import RouteError, UnsupportedError
from trimtab.models.anatomy import Anatomy

POLICY = "policy"


@final
class SpotTune(Method):
    """``SpotTune(inner="lora(rank=8)")``; ``hidden`` is the width of the policy network."""

    kind: ClassVar[str] = "spottune"
    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = (
        "each example chooses its own blocks, so no one weight serves all"
    )
    needs_prompt: ClassVar[bool] = True
    lr: ClassVar[float] = 5e-4

    inner: Any = "lora"
    """The method whose edits are gated."""
    hidden: int = Field(default=64, ge=1)
    """Width of the policy network."""
    temperature: float = Field(default=5.0, gt=0)
    """Of the sampled choice in training."""
    blocks: int | None = Field(default=None, ge=1)
    """Adapt at most so many blocks over a batch."""
    budget_weight: float = Field(default=0.01, ge=0)
    """Weight of the two losses that keep to ``blocks``."""

    @field_validator("inner")
    @classmethod
    def _inner(cls, value: Any) -> Method:
        inner = method_from(value)
        if inner.needs_prompt or not inner.layerwise:
            raise ValueError(
                f"{inner.kind} does not edit layers on its own; choose a layer-wise method"
            )
        return inner

    @field_validator("targets", "exclude", "layers")
    @classmethod
    def _of_inner(cls, value: Any) -> Any:
        if value:
            raise ValueError("the inner method says where it acts: inner=lora(targets='mlp')")
        return value

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        places = [p for p in self.inner.place(anatomy) if anatomy.block_of(p.path) is not None]
        inputs = anatomy.inputs_of([place.path for place in places])
        if not places or not inputs:
            raise UnsupportedError(
                "SpotTune needs a transformer with blocks and one input embedding that Trimtab knows: its policy "
                "reads the embeddings and decides block by block. Of a model with two towers, target one."
            )
        return [*(Place(path, POLICY) for path in inputs), *places]

    def at(self, path: str) -> SpotTune:
        inner = self.inner.at(path)
        return self if inner is self.inner else self.replace(inner=inner)

    @property
    def fixed(self) -> frozenset[str]:
        return self.inner.fixed

    def observes(self, role: str) -> Observation | None:
        return None if role == POLICY else self.inner.observes(role)

    def informed(self, observed: Mapping[str, Sequence[Observed]]) -> SpotTune:
        return self.replace(inner=self.inner.informed(observed))

    def plain(self) -> SpotTune:
        return self.replace(inner=self.inner.plain())

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        if place is None or place.role == POLICY:
            return dict(tensors)
        return cast(dict[str, Tensor], self.inner.plain_tensors(tensors, place))

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        return {} if role == POLICY else self.inner.tensors(layer, role)

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        width = anatomy.width_at(places[0].path)
        count = len(anatomy.blocks)
        return {
            "norm": Spec("policy.norm.weight", (width,), ones),
            "down": Spec("policy.down.weight", (self.hidden, width), normal(width**-0.5)),
            "b_down": Spec("policy.down.bias", (self.hidden,), zeros),
            "up": Spec("policy.up.weight", (2 * count, self.hidden), zeros),
            "b_up": Spec("policy.up.bias", (2 * count,), _open),
        }

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        if at.role == POLICY or not self.inner.overrides("enter"):
            return x
        return self._gated(
            x, lambda part: cast(Tensor, self.inner.enter(p, part, at) - part), at, x
        )

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.role == POLICY or not self.inner.overrides("delta"):
            return None
        return self._gated(x, lambda part: self.inner.delta(p, part, at), at, None)

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        if at.role == POLICY:
            self._decide(y, at)
            return y
        if not self.inner.overrides("leave"):
            return y
        return self._gated(y, lambda part: self.inner.leave(p, part, at) - part, at, y)

    # -- the policy --------------------------------------------------------------------------------------

    def _decide(self, y: Tensor, at: At) -> None:
        """Choose each unit's blocks from the prompt's embeddings, once per generation."""
        if (at.name, POLICY) in at.memory:
            return
        at.require_prompt()
        s = at.shared
        x_UC = F.layer_norm(at.pool(y.detach()), s["norm"].shape, s["norm"])
        hidden = F.gelu(F.linear(x_UC, s["down"], s["b_down"]))
        logits_UL2 = F.linear(hidden, s["up"], s["b_up"]).float().unflatten(1, (-1, 2))
        if at.training:
            noise = -torch.empty_like(logits_UL2).exponential_().log()
            soft = ((logits_UL2 + noise) / self.temperature).softmax(-1)[..., 1]
            gates = (soft > 0.5).to(soft.dtype) - soft.detach() + soft
            self._budget(gates, at)
        else:
            gates = (logits_UL2[..., 1] > logits_UL2[..., 0]).float()
        at.memory[at.name, POLICY] = gates

    def _budget(self, gates_UL: Tensor, at: At) -> None:
        if self.blocks is None:
            return
        z_L = gates_UL[at.part.members(gates_UL.device)].mean(0)
        at.add_loss("blocks", self.budget_weight * (z_L.sum() - self.blocks) ** 2)
        at.add_loss("entropy", -self.budget_weight * (z_L * z_L.clamp_min(1e-6).log()).sum())

    def _gated(
        self, x: Tensor, edit: Callable[[Tensor], Tensor | None], at: At, base: Tensor | None
    ) -> Tensor:
        """``base + gate · edit(x)``; at evaluation the edit is computed for the open positions only."""
        if (at.name, POLICY) not in at.memory:
            raise RouteError(
                f"adapter {at.name!r}: a block is reached before the policy has seen the prompt. Run the model from "
                "its input embeddings (and generate with a cache that began with the prompt)."
            )
        gates_UL = cast(Tensor, at.memory[at.name, POLICY])
        gate = at.part.spread(gates_UL[:, cast(int, at.block)], x)
        if at.training:
            change = cast(Tensor, edit(x))
            change = change * gate.to(change.dtype)
            return change if base is None else base + change
        chosen = gate.flatten().nonzero()[:, 0]
        if chosen.shape[0] == x.shape[0]:
            change = cast(Tensor, edit(x))
            return change if base is None else base + change
        given, at.x = at.x, at.x[chosen]
        change = cast(Tensor, edit(x[chosen]))
        at.x = given
        if base is not None:
            return base.index_add(0, chosen, change)
        return change.new_zeros(x.shape[0], *change.shape[1:]).index_copy(0, chosen, change)


def _open(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Logits (0, 2) for every block: P(adapt) = 0.88."""
    return torch.tensor([0.0, 2.0]).repeat(shape[0] // 2)
