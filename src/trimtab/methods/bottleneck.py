"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): a small MLP after each sub-layer.

    y' = y + W_up σ(W_down y + b_down) + b_up

It acts on the output of attention and of the MLP, before the residual is added (and before the LayerNorm
of a post-norm block), after the sub-layer's own dropout where it has one. Weights start near zero, so
that it is nearly the identity. Set ``train=("norms",)`` to train the norms too, as the paper does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Spec, truncated_normal, zeros
from trimtab.errors import UnsupportedError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@final
class Bottleneck(Method):
    """``Bottleneck(size=64)``: the paper's, at both sub-layers of every block."""

    kind: ClassVar[str] = "bottleneck"
    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = (
        "it passes the sub-layer's output through a non-linear activation"
    )
    lr: ClassVar[float] = 3e-4
    short_names: ClassVar[Mapping[str, str]] = {
        "adapter_down.weight": "down", "adapter_down.bias": "b_down",
        "adapter_up.weight": "up", "adapter_up.bias": "b_up",
    }  # fmt: skip

    targets: str | tuple[str, ...] = ("attention_output", "mlp_output")
    size: int = Field(default=64, ge=1)
    """Width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """The σ between the two maps."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        width = layer.out_features
        if layer.kind in ("conv", "norm") or width == 0:
            raise UnsupportedError(
                "a bottleneck acts on hidden states (…, width) whose width is known from a config."
            )
        near_zero = truncated_normal(1e-3)
        return {
            "down": Spec("adapter_down.weight", (self.size, width), near_zero),
            "b_down": Spec("adapter_down.bias", (self.size,), zeros),
            "up": Spec("adapter_up.weight", (width, self.size), near_zero),
            "b_up": Spec("adapter_up.bias", (width,), zeros),
        }

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        inner = _ACTIVATIONS[self.activation](F.linear(y, p["down"], p["b_down"]))
        return y + F.linear(inner, p["up"], p["b_up"])

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        return {**p, "up": p["up"] * weight, "b_up": p["b_up"] * weight}

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        tensors = [p for _, p in parts]
        joined = {
            "down": torch.cat([p["down"] for p in tensors]),
            "b_down": torch.cat([p["b_down"] for p in tensors]),
            "up": torch.cat([p["up"] for p in tensors], dim=1),
            "b_up": torch.stack([p["b_up"] for p in tensors]).sum(0),
        }
        return self.replace(size=joined["b_down"].shape[0]), joined
