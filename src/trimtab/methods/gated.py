"""A gate on another method (UniPELT, Mao et al. 2021, arXiv 2110.07577): each sequence opens it as far as it needs.

    y = f(x) + g · edit(x),   g = mean_t σ(w · x_t + b),   over the visible positions t (a causal model's prompt)

Every place has a gate of its own, which reads the layer's input (the output of a sub-layer); ``w`` and ``b`` start
at zero, so that it is half open. The inner method keeps its own scaling: UniPELT's code drops LoRA's alpha / rank
where it gates. Experts of a mixture each see a few tokens, so theirs reads the mean of what all of them are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Spec, zeros
from trimtab.adapt.gating import Gating, once, seen, width_seen


@final
class Gated(Gating):
    """``Gated(inner="lora(rank=8)")``; UniPELT is a union of gated methods."""

    kind: ClassVar[str] = "gated"
    why_not_affine: ClassVar[str] = (
        "each example scales it in its own way, so no one weight serves all"
    )
    short_names: ClassVar[Mapping[str, str]] = {"gate.weight": "gate_w", "gate.bias": "gate_b"}

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        return {
            **super().tensors(layer, role),
            "gate_w": Spec("gate.weight", (1, width_seen(layer)), zeros),
            "gate_b": Spec("gate.bias", (1,), zeros),
        }

    def decide(self, p: Params, value: Tensor, at: At) -> Tensor:
        around = at.around
        if around is not None:
            x_UC = once(at, (at.path, at.context.share), lambda: at.pool(around.x, around.part))
            return torch.sigmoid(F.linear(x_UC, p["gate_w"], p["gate_b"]))[:, 0]
        return once(at, (at.path, at.context.share), lambda: self._mean(p, seen(value, at), at))

    def _mean(self, p: Params, x: Tensor, at: At) -> Tensor:
        return at.pool(torch.sigmoid(F.linear(x, p["gate_w"], p["gate_b"])))[:, 0]
