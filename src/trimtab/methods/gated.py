"""A gate on another method (UniPELT, Mao et al. 2021, arXiv 2110.07577): each sequence opens it as far as it needs.

    y = f(x) + g · edit(x),   g = mean_t σ(w · x_t + b),   over the visible positions t (a causal model's prompt)

Every place has a gate of its own, which reads the layer's input (the output of a sub-layer); ``w`` and ``b`` start
at zero, so that it is half open. The inner method keeps its own scaling: UniPELT's code drops LoRA's alpha / rank
where it gates. A prefix has its keys and values scaled, as there. Experts of a mixture each see a few tokens, so
theirs reads the mean of what all of them are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Spec, zeros
from trimtab.adapt.gating import Gating, once, seen, width_seen
from trimtab.adapt.route import Part


@final
class Gated(Gating):
    """``Gated(inner="lora(rank=8)")``; UniPELT is a union of gated methods."""

    kind: ClassVar[str] = "gated"
    why_not_affine: ClassVar[str] = (
        "each example scales it in its own way, so no one weight serves all"
    )
    in_attention: ClassVar[bool] = True
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

    def keys_values(self, p: Params, at: At) -> tuple[Tensor, Tensor] | None:
        """Those of the inner method, each sequence's scaled by its gate, which reads the attention's input."""
        found = self.inner.keys_values(p, at)
        if found is None:
            return None
        part = next(part for part in at.context.layout(at.x).parts if part.owner == at.part.owner)
        gates_U = once(at, (at.path, at.context.share), lambda: self._of_part(p, part, at))
        gates_U11 = gates_U.to(at.dtype)[:, None, None]
        return found[0] * gates_U11, found[1] * gates_U11

    @property
    def virtual_tokens(self) -> int:
        return int(self.inner.virtual_tokens)

    def _of_part(self, p: Params, part: Part, at: At) -> Tensor:
        opened = torch.sigmoid(F.linear(part.take(at.x), p["gate_w"], p["gate_b"]))
        return at.pool(opened, part)[:, 0]

    def _mean(self, p: Params, x: Tensor, at: At) -> Tensor:
        return at.pool(torch.sigmoid(F.linear(x, p["gate_w"], p["gate_b"])))[:, 0]
