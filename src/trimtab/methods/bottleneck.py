"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): a small MLP after each sub-layer.

    y' = y + W_up σ(W_down y + b_down) + b_up

It acts on the output of attention and of the MLP, before the residual is added (and before the LayerNorm
of a post-norm block), after the sub-layer's own dropout where it has one. Weights start near zero, so
that it is nearly the identity. The paper trains the norms too: ``train=("norms",)``, or the preset ``houlsby``.
"""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field

from trimtab.adapt.contract import Init, truncated_normal
from trimtab.adapt.mlp import InsertedMLP


@final
class Bottleneck(InsertedMLP):
    """``Bottleneck(size=64)``: the paper's, at both sub-layers of every block."""

    kind: ClassVar[str] = "bottleneck"
    lr: ClassVar[float] = 3e-4
    weight_decay: ClassVar[float] = 0.01
    inits: ClassVar[tuple[Init, Init]] = (truncated_normal(1e-3), truncated_normal(1e-3))

    targets: str | tuple[str, ...] = ("attention_output", "mlp_output")
    size: int | None = Field(default=64, ge=1)
    """Width of the middle."""
