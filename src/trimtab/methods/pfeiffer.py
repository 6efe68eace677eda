"""Pfeiffer's adapters (Pfeiffer et al. 2020, arXiv 2005.00247): one small MLP a block, after the feed-forward.

    post-norm   out = LN( s + f(LN(s)) ),   s = feed-forward + residual, LN the block's own frozen norm
    pre-norm    out = y + f(y),             y the block's output
    f(h) = W_up σ(W_down h + b_down) + b_up

In a post-norm block it is one edit of what goes into the last norm, which the adapter reads through that norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from pydantic import Field

from trimtab.adapt.contract import Init, Place, normal
from trimtab.adapt.mlp import NORM, Activation, BeforeNorm, InsertedMLP
from trimtab.models.anatomy import Anatomy


@final
class Pfeiffer(BeforeNorm, InsertedMLP):
    """``Pfeiffer(reduction=16)``: after the feed-forward of every block; ``targets`` names other layers."""

    kind: ClassVar[str] = "pfeiffer"
    lr: ClassVar[float] = 1e-4
    inits: ClassVar[tuple[Init, Init]] = (normal(0.02), normal(0.02))

    reduction: int | None = Field(default=16, ge=1)
    """The width divided by it is the size of the middle."""
    activation: Activation = "relu"
    """The σ between the two maps."""

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        norms = anatomy.role("mlp_norm")
        chosen = self.targets or tuple(norms) or "blocks"
        paths = anatomy.select(chosen, self.exclude, self.layers)
        return [Place(path, NORM if path in norms else "") for path in paths]
