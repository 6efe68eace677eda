"""Methods that train a copy of a layer's own tensors and use it in place of them.

    y = f(x; W', b'),   W' and b' start as copies

The frozen layer stays as it is, so each row of a batch may have its own copy.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.func import functional_call

from trimtab.adapt.contract import At, Layer, Method, Params, Spec, copy_of
from trimtab.adapt.in_peft import TIED
from trimtab.errors import UnsupportedError


class Replaced(Method):
    """A subclass names the slots: ``slot`` and the layer's own name of the tensor."""

    slot: ClassVar[str]
    instead_of: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if role == TIED:
            return {}
        stored = layer.stored()
        dense = all(value.is_floating_point() for value in stored.values())
        if layer.kind == "sublayer" or "weight" not in stored or not dense:
            raise UnsupportedError("full training needs a layer that holds its weight densely.")
        return {
            name: Spec(f"{self.slot}.{name}", tuple(value.shape), copy_of(value))
            for name, value in stored.items()
        }

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        if at.layer.kind == "norm":
            own: Tensor = functional_call(at.layer.module, dict(p), (at.x,))
            return own
        own = at.layer.apply(at.x, at.layer.orient(p["weight"]))
        bias = at.layer.bias() if at.role == TIED else p.get("bias")
        return own if bias is None else own + at.layer.over_out(bias.to(own.dtype))

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        return layer.orient(p["weight"]), layer.bias() if role == TIED else p.get("bias")
