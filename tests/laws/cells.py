"""The cells of the laws: every registered method on every model, and what must be refused, with the reason.

A method that registers is here at once, with its defaults; ``SMALL`` only makes known ones small. A cell that
is not in ``REFUSED`` must work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.t5 import modeling_t5

import trimtab as tt
from tests.tiny import CASES
from trimtab.adapt.contract import Method
from trimtab.adapt.parse import method_from

SMALL = {
    "lora": "lora(rank=4)",
    "dora": "dora(rank=4)",
    "bottleneck": "bottleneck(size=6)",
    "prefix": "prefix(length=3, init_std=1.0)",
    "spottune": "spottune(inner=lora(rank=4), hidden=8)",
    "full": "full(targets='mlp_down')",
    "adafit": "adafit(inner=lora(rank=4), group_size=4, width=6)",
    "gated": "gated(inner=lora(rank=4))",
    "union": "lora(rank=4)|bitfit|prefix(length=3, init_std=1.0)",
}
EVERY_KIND = "lora(rank=4, targets=['embed', 're:conv.*', 'grouped', 'head'])"
ON_MODEL = {
    ("adafit", "mixed"): f"adafit(inner={EVERY_KIND}, group_size=3, width=6)",
    ("lora", "mixed"): EVERY_KIND,
    ("dora", "mixed"): "dora(rank=4, targets=['re:conv.*', 'grouped', 'head'])",
    (
        "ia3",
        "mixed",
    ): "ia3(targets=['embed', 'conv1', 'conv2', 'norm'], feedforward=['head', 'grouped', 'conv3'])",
    (
        "full",
        "mixed",
    ): "full(targets=['embed', 're:conv.*', 'grouped', 'head', 'norm', 'batch_norm'])",
    ("gated", "mixed"): f"gated(inner={EVERY_KIND})",
    ("lora", "classifier"): "lora(rank=4, train=['score'])",
    ("lora", "bert"): "lora(rank=4, train=['classifier'])",
}

NO_ATTENTION = "there is no attention in it to put keys and values into"
NO_BLOCKS = "it has no transformer blocks and no hidden states of one width"
REFUSED = {
    ("bottleneck", "mixed"): NO_BLOCKS,
    ("prefix", "mixed"): NO_ATTENTION,
    ("spottune", "mixed"): NO_BLOCKS,
    ("union", "mixed"): NO_ATTENTION,
}
"""Cells that mathematics forbids."""
if not hasattr(
    modeling_t5, "ALL_ATTENTION_FUNCTIONS"
):  # releases before its attention joined the registry
    REFUSED |= {
        (method, name): "its attention cannot be reached"
        for method in ("prefix", "union")
        for name in ("t5", "t5-gated")
    }

NOT_MERGEABLE = {
    "bottleneck": "a non-linear activation",
    "prefix": "softmax of attention",
    "spottune": "each example chooses",
    "gated": "each example scales",
    "adafit": "each example opens",
    "union": "in its part prefix, it adds keys and values to the softmax of attention",
}
IDENTITY_AT_FIRST = {"lora", "dora", "ia3", "bitfit", "spottune", "full", "gated", "adafit"}
"""Methods whose papers start them as the identity (a Houlsby bottleneck only nearly; a prefix never)."""


@dataclass(frozen=True)
class Cell:
    method: str
    model: str

    @property
    def id(self) -> str:
        return f"{self.method}-{self.model}"

    def value(self) -> Method:
        text = ON_MODEL.get((self.method, self.model)) or SMALL.get(self.method, self.method)
        return method_from(text)


def registered() -> list[str]:
    return tt.methods()


def cells() -> list[Cell]:
    return [Cell(m, c) for m in registered() for c in CASES if (m, c) not in REFUSED]


def shaken(adapter: tt.Adapter, size: float = 0.2, seed: int = 1) -> tt.Adapter:
    """Give an attached adapter values away from its first ones, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)
    return adapter


def attached(cell: Cell, model: nn.Module, name: str = "a", *, seed: int = 1) -> tt.Adapter:
    """The cell's method attached and shaken."""
    return shaken(tt.attach(model, cell.value(), name), seed=seed)
