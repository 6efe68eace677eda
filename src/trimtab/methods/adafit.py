"""AdaFit (after AdaFilter, arXiv 1911.09659): each example opens the output channels of a small layer that it needs.

    y = f(x) + g ⊙ Δ(x),   g ∈ {0, 1} by group of output channels,   Δ an inner method (LoRA of rank 8)

The name is found in lists of methods without a definition or a citation. This is Trimtab's: AdaFilter (Guo et al.
2020, arXiv 1911.09659, SpotTune's authors) for transformers, with a small layer in place of a copy of each filter.

    c_l = mean over the visible positions of A x       (``reads="lowrank"``; or of x itself: "input", AdaFilter's)
    h_l, s_l = LSTM(W_l c_l + b_l; h_{l−1}, s_{l−1})   one LSTM for all places, in the order of execution
    g_l = 1[ σ(U_l h_l + u_l) > ½ ],                   gradient straight through; u_l starts at 2 (open)

``scope``: "sequence" as above; "token" decides at each position, from that position alone; "static" learns one
logit a group, reads nothing, and merges. ``controller="mlp"`` is a tanh layer in place of the LSTM. The auxiliary
loss is ``sparsity_weight`` · mean σ, or with ``target_rate`` · (mean σ − target)². An expert of a mixture sees a few
tokens of a sequence: in scope "sequence" its gates read the state of the LSTM alone, in "token" they start afresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Place, Spec, constant
from trimtab.adapt.gating import Gating, seen, straight_through, to_last, width_seen
from trimtab.adapt.recurrent import SHORT_NAMES, carried, lstm_specs, site_specs
from trimtab.errors import UnsupportedError
from trimtab.models.anatomy import Anatomy


@final
class AdaFit(Gating):
    """``AdaFit(inner="lora(rank=8)", group_size=64)``; ``width`` is that of the LSTM's state."""

    kind: ClassVar[str] = "adafit"
    why_not_affine: ClassVar[str] = (
        "each example opens its own channels, so no one weight serves all"
    )
    short_names: ClassVar[Mapping[str, str]] = {"gate.logit": "gate_logit", **SHORT_NAMES}

    inner: Any = "lora(rank=8)"
    """The method whose output channels are gated."""
    scope: Literal["sequence", "token", "static"] = "sequence"
    """What decides: the whole sequence, each token, or nothing (a learned gate that merges)."""
    controller: Literal["rnn", "mlp"] = "rnn"
    """One LSTM through all places, or a tanh layer at each."""
    reads: Literal["lowrank", "input"] = "lowrank"
    """The inner method's low-rank code, or the layer's input."""
    width: int = Field(default=32, ge=1)
    """Width of the state."""
    group_size: int = Field(default=64, ge=1)
    """How many output channels share a gate."""
    sparsity_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss that closes gates."""
    target_rate: float | None = Field(default=None, ge=0, le=1)
    """The share of open gates that this loss aims at; empty is none."""

    @model_validator(mode="after")
    def _outputs(self) -> Self:
        if self.inner.overrides("enter"):
            raise ValueError(
                f"{self.inner.kind} edits a layer's input; output channels cannot gate that"
            )
        return self

    @property
    def unmergeable(self) -> str:
        inner: str = self.inner.unmergeable
        return inner if self.scope == "static" else self.why_not_affine

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        inner = super().tensors(layer, role)
        groups = -(-layer.out_features // self.group_size)
        if self.scope == "static":
            return {**inner, "gate_logit": Spec("gate.logit", (groups,), constant(2.0))}
        if self.scope == "token" and layer.kind not in ("linear", "embedding", "sublayer"):
            raise UnsupportedError(
                f"adafit: a {layer.kind} layer moves or has no positions, so scope 'token' has no meaning there."
            )
        if self.reads == "lowrank" and "A" not in inner:
            raise UnsupportedError(
                f"adafit: {self.inner.kind} has no low-rank code for gates to read; set reads='input'."
            )
        features = inner["A"].shape[0] if self.reads == "lowrank" else width_seen(layer)
        return {**inner, **site_specs(features, self.width, groups, 2.0)}

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        inner = super().shared(anatomy, places)
        if self.scope == "static" or self.controller == "mlp":
            return inner
        if self.scope == "token" and anatomy.encoder_decoder:
            raise UnsupportedError(
                "adafit: with scope 'token' the LSTM goes from place to place at one position, and an encoder-decoder "
                "has two sequences of positions; set controller='mlp', or scope='sequence'."
            )
        return {**inner, **lstm_specs(self.width)}

    def decide(self, p: Params, value: Tensor, at: At) -> Tensor:
        if self.scope == "static":
            soft = torch.sigmoid(p["gate_logit"])
        else:
            h = carried(
                at, lambda: self._read(p, value, at), self.width, self._cell(at), self.scope
            )
            soft = torch.sigmoid(F.linear(h, p["gate_write"], p["gate_b_write"]))
        self._add_loss(soft, at)
        return straight_through(soft)

    def over(self, gates: Tensor, like: Tensor, at: At) -> Tensor:
        channels = to_last(like, at.layer).shape[-1]
        groups = torch.arange(channels, device=gates.device) // self.group_size
        gates = gates.index_select(-1, groups)
        if self.scope == "static":
            return at.layer.over_out(gates)
        return gates if self.scope == "token" else super().over(gates, like, at)

    def _read(self, p: Params, value: Tensor, at: At) -> Tensor:
        """What the controller takes: by unit, or by position."""
        if self.reads == "lowrank":
            c = to_last(at.layer.apply(at.x.detach(), p["A"].detach()), at.layer)
        else:
            c = seen(value, at).detach()
        c = c if self.scope == "token" else at.pool(c)
        return F.linear(c, p["gate_read"], p["gate_b_read"])

    def _cell(self, at: At) -> Mapping[str, Tensor]:
        shared = at.shared if self.controller == "rnn" else {}
        return {k.removeprefix("gate_"): v for k, v in shared.items() if k.startswith("gate_")}

    def _add_loss(self, soft: Tensor, at: At) -> None:
        if not at.training or not self.sparsity_weight:
            return
        seen_here = soft[at.part.members(soft.device)] if self.scope == "sequence" else soft
        rate = seen_here.mean()
        value = rate if self.target_rate is None else (rate - self.target_rate) ** 2
        at.add_loss("gates", self.sparsity_weight / at.count * value)
