"""LoRA (Hu et al. 2021, arXiv 2106.09685): add a low-rank product beside a frozen layer.

    y = W x + s · B A x,   s = alpha / rank,  or  alpha / √rank with ``rslora`` (arXiv 2312.03732)

Fields, initial values and PEFT's grammar are those of `trimtab.adapt.lowrank`. Three more change how it is
trained, and leave a file that is an ordinary LoRA's:

    plus        LoRA+ (arXiv 2402.12354): the factor that starts at zero learns ``plus`` times as fast
    frozen_a    LoRA-FA (arXiv 2308.03303): the other factor stays as drawn, so that x need not be kept for backward;
                gradients become  g_B ← g_B (A Aᵀ + 1e-8)⁻¹ / s², those of the nearest change of W
    bits        both factors are rounded to 8 or 4 bits wherever they are used, and steps are taken on fp32 ones: what
                is trained is what ``save(bits=...)`` stores. (QLoRA rounds the frozen base instead.)

One changes where it acts:

    invocation  aLoRA (arXiv 2504.12397): only from the last occurrence of these tokens in a row on, so that what was
                read before it, and cached, is the bare base's

An embedding swaps the two factors: its A starts at zero. With ``tie``, a head that is tied to it has the same factors:

    W_head = Eᵀ,   ΔW_head = (s · B A)ᵀ = s · Aᵀ Bᵀ
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Place, Sites, Spec
from trimtab.adapt.factors import paired
from trimtab.adapt.in_peft import TIED
from trimtab.adapt.invoked import invoked
from trimtab.adapt.lowbit import SHORTEST, rounded
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.lowrank_in_peft import projections
from trimtab.adapt.tied import with_tied
from trimtab.errors import UnsupportedError
from trimtab.kernels.lowrank import Change
from trimtab.models.anatomy import Anatomy

RANDOM = frozenset({"lora_A.weight", "lora_embedding_B"})
FACTORS = ("A", "B")


@final
class LoRA(LowRank):
    """``LoRA(rank=16, alpha=32, targets="all-linear")``, ``LoRA(init="pissa")``; LoRA+ is ``LoRA(plus=16)``."""

    kind: ClassVar[str] = "lora"
    halves: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    peft_own: ClassVar[tuple[str, ...]] = ("alora_invocation_tokens", "ensure_weight_tying")
    lr: ClassVar[float] = 2e-4

    plus: float = Field(default=1.0, gt=0)
    """LoRA+: how many times as fast the factor that starts at zero learns."""
    frozen_a: bool = False
    """LoRA-FA: train only the factor that starts at zero."""
    bits: Literal[4, 8] | None = None
    """Round both factors wherever they are used, as ``save(bits=...)`` stores them."""

    invocation: tuple[int, ...] = ()
    """aLoRA: act only from the last occurrence of these tokens in a row on."""

    tie: bool = False
    """Where an embedding or a head is a target and they are tied, edit both by the same factors."""

    @model_validator(mode="after")
    def _invoked_alone(self) -> Self:
        if self.invocation and self.bias != "none":
            raise ValueError("invocation: a trained bias would act before it; leave bias at none")
        return self

    @model_validator(mode="after")
    def _wide_enough(self) -> Self:
        if self.bits and min([self.rank, *self.rank_pattern.values()]) < SHORTEST:
            raise ValueError(
                f"bits rounds rows of the factors, so the rank must be {SHORTEST} or more"
            )
        if self.bits and (self._away or self.rebased):
            raise ValueError(
                f"bits rounds the factors, which would move the start that {self.init} keeps"
            )
        return self

    @model_validator(mode="after")
    def _one_learns(self) -> Self:
        if self._keeps_b and (self.frozen_a or self.plus != 1):
            raise ValueError(
                f"{self.init} trains A alone, which leaves frozen_a and plus no meaning"
            )
        return self

    @property
    def _keeps_b(self) -> bool:
        return self._start is not None and self._start.keeps_b

    @property
    def remembers(self) -> bool:
        return bool(self.invocation)

    @property
    def unmergeable(self) -> str:
        invoked = "it acts from its invocation tokens on, and a merged weight acts everywhere"
        return invoked if self.invocation else super().unmergeable

    @property
    def rates(self) -> Mapping[str, float]:
        learners = set(self.short_names) - RANDOM
        return dict.fromkeys(learners, self.plus) if self.plus != 1 else {}

    @property
    def fixed(self) -> frozenset[str]:
        return super().fixed | (RANDOM if self.frozen_a else frozenset())

    @property
    def peft_nests(self) -> bool:
        own = self.rank_pattern or self.alpha_pattern or self.lora_bias or self.bias != "none"
        return not (self.dropout or own or self.rebased or self.invocation)

    @property
    def peft_opens(self) -> bool:
        return not (self.rebased or self.invocation)

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        # PEFT has one rank and one alpha for both projections of an nn.MultiheadAttention
        pairs = projections(place.path for place in places)
        alike = all(self.at(one) == self.at(other) for one, other in pairs)
        # and refuses these together
        own = self._keeps_b and (self.lora_bias or bool(self.invocation))
        refused = own or (self.rebased and self.lora_bias)
        return alike and not refused and super().in_peft(anatomy, places)

    def peft_differs(self, layer: Layer) -> str:
        if self.invocation and layer.kind != "linear":
            return "it waits for invocation tokens at linear layers alone"
        return super().peft_differs(layer)

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        places = super().place(anatomy)
        return with_tied(anatomy, places) if self.tie else places

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if role == TIED:
            return {}
        if self.invocation and layer.kind not in ("linear", "embedding", "expert"):
            raise UnsupportedError(
                f"lora: invocation tells tokens apart, and a {layer.kind} layer mixes or does not see them."
            )
        specs = super().tensors(layer, role)
        if not self.bits:
            return specs
        # rounded before they are cast, as they are in a file
        return {k: replace(s, cast=False) if k in FACTORS else s for k, s in specs.items()}

    def lowrank(self, p: Params, at: At) -> Change | None:
        # of a frozen A the product is kept, and no x
        plain = at.role != TIED and not (self.bits or self.invocation or self.frozen_a)
        return super().lowrank(p, at) if plain else None

    def stacks(self, p: Params, role: str) -> Change | None:
        if role or self.invocation or self.tie or self.rebased or not {"c", "D"}.isdisjoint(p):
            return None
        return Change(*self.whole(self._rounded(p)), scale=1.0)

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.role == TIED:
            p = turned(p, at.layer)
        if self.bits:
            p = {short: tensor.to(at.dtype) for short, tensor in self._rounded(p).items()}
        change = super().delta(p, x, at)
        if change is None or not self.invocation:
            return change
        acts = invoked(at, x, self.invocation, ids=at.layer.kind == "embedding")
        return torch.where(acts[..., None], change, 0.0)

    def product(self, p: Params, layer: Layer) -> Tensor:
        if self.invocation:
            raise UnsupportedError(f"lora: no weight equals it: {self.unmergeable}.")
        return super().product(self._rounded(p), layer)

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        return super().merged(turned(p, layer) if role == TIED else p, layer, role)

    def before_step(self, sites: Sites) -> None:
        if not self.frozen_a:
            return
        for place, p in sites.items():
            if place.role not in (*BIASES, TIED):
                method = self.at(place.path)
                _project(p["A"], p["B"], method.rank, method.scaling)

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        kept = {"init_lora_weights": self.init} if self._keeps_b else {}
        tokens = {"alora_invocation_tokens": list(self.invocation)} if self.invocation else {}
        tied = {"ensure_weight_tying": True} if self.tie else {}
        return {**super().to_peft(places), **kept, **tokens, **tied}

    def plain(self) -> Method:
        plain = super().plain()
        return plain.replace(bits=None) if self.bits else plain

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        named = {slot: self.short_names.get(slot) for slot in tensors}
        exact = {
            slot: rounded(tensor, self.bits) if self.bits and named[slot] in FACTORS else tensor
            for slot, tensor in tensors.items()
        }
        return super().plain_tensors(exact, place)

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        self._check_whole()
        return super().scaled(p, weight, role)

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        self._check_whole()
        if any(dict(method).get("invocation", ()) != self.invocation for method, _ in parts):
            raise UnsupportedError(
                "lora: what is invoked by other tokens, or by none, acts elsewhere, so they have no sum."
            )
        return super().sum(parts, role)

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Self | None:
        if config.get("arrow_config"):
            raise UnsupportedError(
                "this is the router of an Arrow model: it has no tensors of its own, and routes among LoRAs in other "
                "folders. Make it anew from these: trimtab.peft.create_arrow_model(base, folders, config)."
            )
        return super().from_peft(config, slots)

    @classmethod
    def fields_of_variant(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        tokens, tie = (config.get(name) for name in cls.peft_own)
        return {"invocation": tuple(tokens or ()), "tie": bool(tie)}

    def _rounded(self, p: Params) -> Params:
        if not self.bits:
            return p
        return {k: rounded(t, self.bits) if k in FACTORS else t for k, t in p.items()}

    def _check_whole(self) -> None:
        if self.bits:
            raise UnsupportedError(
                "lora: factors of few bits are rounded anew, so their sums and multiples are not exact; take those of "
                "trimtab.exported(adapter)."
            )


def turned(p: Params, layer: Layer) -> Params:
    """The factors of an embedding's weight, as those of a layer that is tied to it: a head's is the transpose."""
    if layer.kind == "embedding":
        return p
    other = {"A": "B", "B": "A", "A0": "B0", "B0": "A0", "D": "D"}
    return {other[short]: tensor.T for short, tensor in p.items() if short in other}


def _project(a: Tensor, b: Tensor, rank: int, scaling: float) -> None:
    """Make the gradient of the factor that learns that of the nearest change of W, by the other's Gram matrix."""
    a_GRI, b_GOR = paired(a, b, rank)
    learner, gram = (b, a_GRI @ a_GRI.mT) if b.grad is not None else (a, b_GOR.mT @ b_GOR)
    if learner.grad is None:
        return
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.pinv(gram + 1e-8 * eye, hermitian=True) / scaling**2
    gradient = learner.grad.reshape(b_GOR.shape if learner is b else a_GRI.shape)
    new = gradient @ inverse if learner is b else inverse @ gradient
    learner.grad.copy_(new.reshape(learner.grad.shape))
