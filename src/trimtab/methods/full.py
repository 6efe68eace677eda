"""Full training of chosen modules as an adapter: a copy of each weight, used in place of the frozen one.

    y = f(x; W', b'),   W' and b' start as copies

It is how a classification head belongs to an adapter (``LoRA(train=("score",))``), per adapter and under the
same routes; the frozen module stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from torch import Tensor
from torch.func import functional_call

from trimtab.adapt.contract import At, Method, Params, Place, Spec, copy_of
from trimtab.errors import UnsupportedError
from trimtab.frozen import Layer, view
from trimtab.models.anatomy import Anatomy


@final
class Full(Method):
    """``Full(targets=("score",))``: a module that is no layer itself stands for the layers inside it."""

    kind: ClassVar[str] = "full"
    lr: ClassVar[float] = 5e-5

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        chosen: list[str] = []
        for path in anatomy.select(self.targets, self.exclude, self.layers):
            inside = [p for p in anatomy.modules if p == path or p.startswith(f"{path}.")]
            chosen += [p for p in inside if view(anatomy.modules[p]) is not None and p not in chosen]
        return [Place(path) for path in chosen]

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if layer.kind == "sublayer" or not layer.module._parameters:
            raise UnsupportedError("full training needs a layer that holds its weight densely.")
        return {
            name: Spec(f"modules_to_save.{name}", tuple(value.shape), copy_of(value))
            for name, value in layer.module._parameters.items()
            if value is not None and name in ("weight", "bias")
        }

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        own: Tensor = functional_call(at.layer.module, dict(p), (at.x,))
        return own

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        return layer.orient(p["weight"]), p.get("bias")
