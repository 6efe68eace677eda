"""AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247): an attention over several trained adapters.

    y' = y + Σ_n p_n V f_n(h),   p = softmax_n( (Q h) · (K f_n(h)) )

f_n are the changes that the parts make from h (what they read; in a post-norm block h = LN(y)). Their tensors
lie in this adapter, fixed; Q, K and V are trained. V starts as the identity and is held near it by a loss,
``regularisation`` · ‖1 − V‖². `trimtab.fused` makes a fusion from trained adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Place, Spec, normal, zeros
from trimtab.adapt.mlp import BeforeNorm, Inserted
from trimtab.adapt.parse import method_from
from trimtab.errors import TargetError
from trimtab.models.anatomy import Anatomy


@final
class Fusion(BeforeNorm):
    """``Fusion(parts=("pfeiffer(reduction=16)", "pfeiffer(reduction=16)"))``: the sites are those of the parts."""

    kind: ClassVar[str] = "fusion"
    lr: ClassVar[float] = 5e-5

    parts: tuple[Any, ...] = Field(default=("pfeiffer", "pfeiffer"))
    """The methods of the adapters that are fused."""
    regularisation: float = Field(default=0.01, ge=0.0)
    """Weight of the loss that holds V near the identity."""

    @field_validator("parts", mode="after")
    @classmethod
    def _parts(cls, value: tuple[Any, ...]) -> tuple[Method, ...]:
        parts = tuple(method_from(part) for part in value)
        wrong = [part.kind for part in parts if not isinstance(part, Inserted) or part.train]
        if wrong or len(parts) < 2 or any(isinstance(part, Fusion) for part in parts):
            raise ValueError(
                "a fusion needs at least two parts that add to hidden states on the spot (bottleneck, pfeiffer, "
                "adapterplus, compacter) and train nothing else"
            )
        return parts

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset(_slot(n, s) for n, part in enumerate(self.parts) for s in part.short_names)

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        each = [list(part.place(anatomy)) for part in self.parts]
        if (
            self.targets
            or self.exclude
            or self.layers is not None
            or any(e != each[0] for e in each)
        ):
            raise TargetError(
                "fusion: its sites are those of its parts, which must be the same for all; set targets in the parts."
            )
        return each[0]

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        width = layer.out_features
        square = (width, width)
        return {
            **_held(part.tensors(layer, role) for part in self.parts),
            "Q": Spec("fusion_query.weight", square, normal(0.02)),
            "b_Q": Spec("fusion_query.bias", (width,), zeros),
            "K": Spec("fusion_key.weight", square, normal(0.02)),
            "b_K": Spec("fusion_key.bias", (width,), zeros),
            "V": Spec("fusion_value.weight", square, _identity),
        }

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        return _held(part.shared(anatomy, places) for part in self.parts)

    def change(self, p: Params, h: Tensor, at: At) -> Tensor:
        each = [part.change(_own(p, n), h, at) for n, part in enumerate(self.parts)]
        f_NC = torch.stack(each, dim=-2)
        keys_NC, query_C = F.linear(f_NC, p["K"], p["b_K"]), F.linear(h, p["Q"], p["b_Q"])
        weights_N = (keys_NC @ query_C.unsqueeze(-1)).squeeze(-1).softmax(-1)
        if at.training and self.regularisation:
            value = at.layer.wide(p["V"])
            away = torch.eye(value.shape[0], dtype=value.dtype, device=value.device) - value
            at.add_loss("value", self.regularisation * away.square().sum())
        return F.linear((weights_N.unsqueeze(-2) @ f_NC).squeeze(-2), p["V"])


def _slot(number: int, slot: str) -> str:
    return f"part{number}_{slot}"


def _held(each: Any) -> dict[str, Spec]:
    """The specs of all parts, under the names that the fusion gives them."""
    return {
        f"{n}.{short}": Spec(_slot(n, spec.name), spec.shape, spec.init, spec.cast, spec.stored)
        for n, specs in enumerate(each)
        for short, spec in specs.items()
    }


def _own(p: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors of one part, by its own names."""
    prefix = f"{number}."
    return {short.removeprefix(prefix): t for short, t in p.items() if short.startswith(prefix)}


def _identity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The identity, with 1e-6 beside the diagonal."""
    return torch.full(shape, 1e-6).fill_diagonal_(1.0)
