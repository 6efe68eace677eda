"""(IA)³ (Liu et al. 2022, arXiv 2205.05638): rescale keys, values and the inner activations of the MLP.

    k' = l_k ⊙ (W_k x),   v' = l_v ⊙ (W_v x),   y = W_2 (l_ff ⊙ h),   l starts at 1

The MLP is rescaled where the paper does it: after the activation, which is the *input* of its last
linear layer, gated or not. In a fused qkv layer only the rows of keys and values are rescaled, wherever
they lie: the role of such a site tells (`trimtab.models.fused`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Place, Spec, ones
from trimtab.adapt.peft_config import refuse_unknown, selectors
from trimtab.errors import UnsupportedError
from trimtab.models.anatomy import Anatomy
from trimtab.models.fused import Fused

OUT, IN, KEYS_VALUES = "out", "in", "keys-values "
_PEFT_DEFAULTS = {"target_modules": None, "exclude_modules": None, "feedforward_modules": None,
                  "fan_in_fan_out": False, "init_ia3_weights": True}  # fmt: skip


@final
class IA3(Method):
    """``targets`` have their output rescaled, ``feedforward`` their input; by default as in the paper."""

    kind: ClassVar[str] = "ia3"
    lr: ClassVar[float] = 5e-3
    peft_type: ClassVar[str | None] = "IA3"
    disk: ClassVar[Mapping[str, str]] = {"ia3_l": "ia3_l"}
    short_names: ClassVar[Mapping[str, str]] = {"ia3_l": "l"}

    feedforward: str | tuple[str, ...] = "mlp_down"
    """Layers whose input is rescaled."""

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        inner = anatomy.select(self.feedforward, (), self.layers) if self.feedforward else []
        if self.targets:
            outer = [
                Place(path, OUT) for path in anatomy.select(self.targets, self.exclude, self.layers)
            ]
            return [
                *(place for place in outer if place.path not in inner),
                *(Place(path, IN) for path in inner),
            ]
        fused = set(anatomy.role("fused_qkv"))
        roles = ("fused_qkv",) if fused else ("keys", "values")
        outer = [
            Place(path, f"{KEYS_VALUES}{anatomy.fused(path)}" if path in fused else OUT)
            for path in anatomy.select(roles, self.exclude, self.layers)
        ]
        return [*outer, *(Place(path, IN) for path in inner)]

    def aimed(self, places: Sequence[Place]) -> IA3:
        outer = tuple(place.path for place in places if place.role != IN)
        inner = tuple(place.path for place in places if place.role == IN)
        return self.replace(targets=outer, exclude=(), layers=None, feedforward=inner)

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if role == IN:
            if layer.kind == "embedding":
                raise UnsupportedError(
                    "(IA)³ cannot rescale the input of an embedding: token ids have no size."
                )
            return {"l": Spec("ia3_l", (1, layer.in_features), ones)}
        fused = _fused(role)
        rows = layer.out_features if fused is None else fused.keys_values
        return {"l": Spec("ia3_l", (rows, 1), ones)}

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        return x * at.layer.over_in(p["l"].flatten()) if at.role == IN else x

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        if at.role == IN:
            return y
        scale, fused = p["l"].flatten(), _fused(at.role)
        return y * at.layer.over_out(scale if fused is None else fused.widened(scale, 1.0))

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        return {"l": 1 + weight * (p["l"] - 1)}

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        return self, {"l": 1 + torch.stack([p["l"] - 1 for _, p in parts]).sum(0)}

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        return not any(_fused(place.role) for place in places)  # PEFT's rescales the queries too

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {
            "target_modules": [place.path for place in places],
            "feedforward_modules": [place.path for place in places if place.role == IN],
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> IA3 | None:
        refuse_unknown(config, _PEFT_DEFAULTS, set(_PEFT_DEFAULTS), "IA3")
        return cls(
            targets=selectors(config.get("target_modules")),
            exclude=selectors(config.get("exclude_modules")),
            feedforward=selectors(config.get("feedforward_modules")),
        )

    def roles_in_file(self, path: str, slots: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        return (IN,) if slots["ia3_l"][0] == 1 else (OUT,)


def _fused(role: str) -> Fused | None:
    """How the rows of this site lie, where it is a fused projection."""
    return Fused.parse(role[len(KEYS_VALUES) :]) if role.startswith(KEYS_VALUES) else None
