"""Arrow (Ostapenko et al. 2024, arXiv 2405.11157): several LoRAs at each layer, among which each token chooses.

    y = f(x) + Σ_e c_e(x) · B_e A_e x,   c = softmax over the top k of |xᵀ p_e| / temperature
    p_e = the first right singular vector of B_e A_e

Nothing is trained for the choice: the prototype p_e is what LoRA e changes most. It is found by 15 power iterations
from one random vector, as in PEFT, and no gradient goes through it. An adapter is made of trained LoRAs by
`trimtab.adapt.routed`, their scales folded into B; one that is attached by itself trains its experts together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self, final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Spec, kaiming_uniform, zeros
from trimtab.errors import UnsupportedError

ITERATIONS = 15


@final
class Arrow(Method):
    """``Arrow(experts=4, rank=8, top_k=2)``."""

    kind: ClassVar[str] = "arrow"
    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = "each token chooses among its experts"
    short_names: ClassVar[Mapping[str, str]] = {"arrow_A": "A", "arrow_B": "B"}

    targets: str | tuple[str, ...] = "all-linear"
    experts: int = Field(default=4, ge=1)
    """How many LoRAs there are."""
    rank: int = Field(default=8, ge=1)
    """The rank of each."""
    top_k: int = Field(default=3, ge=1)
    """How many of them act on a token."""
    temperature: float = Field(default=1.0, gt=0)
    """The higher, the more alike their shares."""
    seed: int = 0
    """Of the vector that the power iterations start from."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} of {self.experts} experts cannot act")
        return self

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if layer.kind != "linear":
            raise UnsupportedError(
                f"arrow: tokens choose by what enters a linear layer, and this is {layer.kind}."
            )
        shape_a = (self.experts, self.rank, layer.in_features)
        shape_b = (self.experts, layer.out_features, self.rank)
        start = Spec("arrow_start", (layer.in_features,), self._start, cast=False, stored=False)
        return {
            "A": Spec("arrow_A", shape_a, _each),
            "B": Spec("arrow_B", shape_b, zeros),
            "start": start,
        }

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        a_ERI, b_EOR = p["A"], p["B"]
        prototypes_EI = at.kept("prototypes", lambda: _prototypes(a_ERI, b_EOR, p["start"]))
        alike = (x @ prototypes_EI.to(x.dtype).T).abs()
        best, which = alike.topk(self.top_k, dim=-1)
        chosen = torch.full_like(alike, float("-inf")).scatter(-1, which, best)
        shares = torch.softmax(chosen / self.temperature, dim=-1)
        z = F.linear(x, a_ERI.flatten(0, 1)).unflatten(-1, (self.experts, self.rank))
        weighted = (z * shares[..., None]).flatten(-2)
        return F.linear(weighted, b_EOR.permute(1, 0, 2).flatten(1))

    def _start(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """A direction that ``seed`` draws, the same everywhere."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return drawn / drawn.norm()


@torch.no_grad()
def _prototypes(a_ERI: Tensor, b_EOR: Tensor, start_I: Tensor) -> Tensor:
    """The first right singular vector of each B A, in fp32 or wider."""
    dtype = torch.promote_types(a_ERI.dtype, torch.float32)
    a, b = a_ERI.to(dtype), b_EOR.to(dtype)
    gram_ERR = b.mT @ b
    v_EI1 = start_I.to(dtype).expand(len(a), -1)[..., None]
    for _ in range(ITERATIONS):
        w = a.mT @ (gram_ERR @ (a @ v_EI1))
        v_EI1 = w / (w.norm(dim=1, keepdim=True) + 1e-8)
    return v_EI1[..., 0]


def _each(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Each expert's A as LoRA's: U(±1/√in)."""
    return torch.stack([kaiming_uniform(shape[1:], generator) for _ in range(shape[0])])
