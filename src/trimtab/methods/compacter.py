"""Compacter (Karimi Mahabadi et al. 2021, arXiv 2106.04647): bottlenecks whose matrices are sums of Kronecker products.

    y' = y + gelu( y H_down + b_down ) H_up + b_up,   H = Σ_i A_i ⊗ (s_i t_i)

The n matrices A_i (n × n) belong to the whole adapter; each site has the thin factors s_i (in/n × k) and
t_i (k × out/n). H is never built. Sites are those of Houlsby's adapters; the preset ``compacter++`` is the
paper's second form, after the feed-forward only. The paper trains the norms too: ``train=("norms",)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Place, Spec, normal, zeros
from trimtab.adapt.mlp import Inserted, Sized, width_of
from trimtab.errors import UnsupportedError
from trimtab.models.anatomy import Anatomy


@final
class Compacter(Inserted, Sized):
    """``Compacter(reduction=32, n=4)``: after both sub-layers of every block."""

    kind: ClassVar[str] = "compacter"
    lr: ClassVar[float] = 3e-3
    short_names: ClassVar[Mapping[str, str]] = {
        "compacter_down_left": "s_down", "compacter_down_right": "t_down", "compacter_down_bias": "b_down",
        "compacter_up_left": "s_up", "compacter_up_right": "t_up", "compacter_up_bias": "b_up",
        "compacter_rule": "A",
    }  # fmt: skip

    targets: str | tuple[str, ...] = ("attention_output", "mlp_output")
    reduction: int | None = Field(default=32, ge=1)
    """The width divided by it is the size of the middle."""
    n: int = Field(default=4, ge=1)
    """How many Kronecker products; it must divide width and size."""
    rank: int = Field(default=1, ge=1)
    """The k of the thin factors."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        width, n, k = width_of(layer), self.n, self.rank
        size = self.size_at(width)
        if width % n or size % n:
            raise UnsupportedError(
                f"compacter: n={n} must divide the width {width} and the size {size}; choose another n or size."
            )
        return {
            "s_down": Spec("compacter_down_left", (n, width // n, k), glorot),
            "t_down": Spec("compacter_down_right", (n, k, size // n), glorot),
            "b_down": Spec("compacter_down_bias", (size,), zeros),
            "s_up": Spec("compacter_up_left", (n, size // n, k), glorot),
            "t_up": Spec("compacter_up_right", (n, k, width // n), glorot),
            "b_up": Spec("compacter_up_bias", (width,), zeros),
        }

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        return {"A": Spec("compacter_rule", (self.n, self.n, self.n), normal(1e-4))}

    def change(self, p: Params, h: Tensor, at: At) -> Tensor:
        z = self.active(kronecker(h, p["A"], p["s_down"], p["t_down"]) + p["b_down"])
        return kronecker(z, p["A"], p["s_up"], p["t_up"]) + p["b_up"]


def kronecker(x: Tensor, a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x Σ_i A_i ⊗ (s_i t_i), factor by factor."""
    groups = torch.einsum("...ap,ipk->...aik", x.unflatten(-1, (a.shape[1], -1)), s)
    mixed = torch.einsum("...aik,iab->...bik", groups, a)
    return torch.einsum("...bik,ikq->...bq", mixed, t).flatten(-2)


def glorot(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Each matrix of a stack uniform in ±√2 · √(6 / (rows + columns))."""
    bound = (12 / (shape[1] + shape[2])) ** 0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
