"""An attention module as a layer, with the frozen projections of its keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from trimtab.errors import UnsupportedError
from trimtab.frozen import Layer, view
from trimtab.frozen.sublayer import SubLayer

if TYPE_CHECKING:
    from trimtab.models.anatomy import Anatomy


@final
class AttentionLayer(SubLayer):
    """An attention: its output is what a sub-layer's is, and its projections can be asked.

    ``heads`` counts its queries' heads, ``keys`` is the width C of its keys.
    """

    def __init__(self, module: nn.Module, width: int, projections: tuple[Layer, ...], heads: int,
                 keys: int) -> None:  # fmt: skip
        super().__init__(module, width)
        self.projections = projections
        self.heads = heads
        self.keys = keys

    @classmethod
    def at(cls, anatomy: Anatomy, path: str) -> AttentionLayer:
        """That of one place in a model: layers for keys and for values, or one layer for all three."""
        found = [
            layer
            for role in ("keys", "values", "fused_qkv")
            for inner in anatomy.role(role)
            if inner.startswith(f"{path}.") and (layer := view(anatomy.modules[inner])) is not None
        ]
        heads, width = anatomy.key_heads
        module = anatomy.modules[path]
        return cls(module, anatomy.width, tuple(found[:2]), anatomy.query_heads, heads * width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (…, C) of x as this attention makes them, before any rotation by position.

        Raises:
            UnsupportedError: nobody knows which layers inside it are its projections.
        """
        if not self.projections:
            raise UnsupportedError(
                f"the projections of keys and values in {type(self.module).__name__} are not known to Trimtab."
            )
        if len(self.projections) == 1:  # queries first, keys and values last
            both = self.projections[0].call(x)[..., -2 * self.keys :]
            keys, values = both.split(self.keys, dim=-1)
        else:
            keys, values = (layer.call(x) for layer in self.projections)
        norm = self.module._modules.get("k_norm")
        if norm is not None:
            width = next(norm.parameters()).numel()
            keys = norm(keys.unflatten(-1, (-1, width))).flatten(-2)
        return keys, values
