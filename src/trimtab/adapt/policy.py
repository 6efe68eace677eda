"""A policy: a small network that reads the mean of a prompt's embeddings and gives two logits a choice.

It begins open: logits (0, 2), so that the second is chosen with probability 0.88 whatever is read.

Shapes: U units (sequences), C width of the embeddings, L choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapt.at import At
from trimtab.adapt.contract import Spec, normal, ones, zeros
from trimtab.adapt.gating import straight_through

USAGE = "policy.usage"
"""The share of examples that choose the second, by choice: a running average, never trained."""
SHORT_NAMES = {
    "policy.norm.weight": "gate_norm", "policy.down.weight": "gate_down", "policy.down.bias": "gate_b_down",
    "policy.up.weight": "gate_up", "policy.up.bias": "gate_b_up", USAGE: "gate_usage",
}  # fmt: skip


def policy_specs(width: int, hidden: int, choices: int) -> dict[str, Spec]:
    """Its tensors."""
    return {
        "gate_norm": Spec("policy.norm.weight", (width,), ones),
        "gate_down": Spec("policy.down.weight", (hidden, width), normal(width**-0.5)),
        "gate_b_down": Spec("policy.down.bias", (hidden,), zeros),
        "gate_up": Spec("policy.up.weight", (2 * choices, hidden), zeros),
        "gate_b_up": Spec("policy.up.bias", (2 * choices,), _open),
        "gate_usage": Spec(USAGE, (choices,), ones, cast=False),
    }


def chosen(y: Tensor, at: At, temperature: float) -> Tensor:
    """gates_UL in {0, 1}: the argmax; in training drawn with Gumbel noise, and straight through."""
    s = at.shared
    x_UC = F.layer_norm(at.pool(y.detach()), s["gate_norm"].shape, s["gate_norm"])
    hidden = F.gelu(F.linear(x_UC, s["gate_down"], s["gate_b_down"]))
    logits_UL2 = F.linear(hidden, s["gate_up"], s["gate_b_up"]).float().unflatten(1, (-1, 2))
    if not at.training:
        return (logits_UL2[..., 1] > logits_UL2[..., 0]).float()
    draw = at.generator(logits_UL2.device)
    noise = at.per_unit(
        lambda count: -torch.empty_like(logits_UL2[:count]).exponential_(generator=draw).log()
    )
    return straight_through(((logits_UL2 + noise) / temperature).softmax(-1)[..., 1])


def _open(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.tensor([0.0, 2.0]).repeat(shape[0] // 2)
