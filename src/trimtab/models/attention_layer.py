"""An attention module as a layer, with the frozen projections of its keys and values."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from trimtab.errors import TargetError, UnsupportedError
from trimtab.frozen import Layer, view
from trimtab.frozen.sublayer import SubLayer
from trimtab.models.fused import FusedRows

if TYPE_CHECKING:
    from trimtab.models.anatomy import Anatomy


@final
class AttentionLayer(SubLayer):
    """An attention: its output is what a sub-layer's is, and its projections can be asked.

    ``heads`` counts its queries' heads; ``rows`` tells the outputs of one projection to all three.
    """

    def __init__(
        self,
        module: nn.Module,
        width: int,
        projections: tuple[Layer, ...],
        heads: int,
        rows: FusedRows | None,
    ) -> None:
        super().__init__(module, width)
        self.projections = projections
        self.heads = heads
        self.rows = rows

    @classmethod
    def at(cls, anatomy: Anatomy, path: str) -> AttentionLayer:
        """That of one place in a model: layers for keys and for values, or one layer for all three."""
        paths = [
            inner
            for role in ("keys", "values", "fused_qkv")
            for inner in anatomy.role(role)
            if inner.startswith(f"{path}.")
        ]
        layers = tuple(layer for inner in paths if (layer := view(anatomy.modules[inner])))
        rows = None
        if len(layers) == 1:
            with suppress(TargetError):
                rows = anatomy.fused_rows(paths[0])
        known = layers if len(layers) == 2 or rows is not None else ()
        heads = anatomy.query_heads_at(path)
        return cls(anatomy.modules[path], anatomy.width_at(path), known, heads, rows)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (…, C) of x as this attention makes them, before any rotation by position.

        Raises:
            UnsupportedError: nobody knows which layers inside it are its projections.
        """
        if not self.projections:
            raise UnsupportedError(
                f"the projections of keys and values in {type(self.module).__name__} are not known to Trimtab."
            )
        if self.rows is not None:
            y = self.projections[0].call(x)
            keys, values = (y[..., rows.to(y.device)] for rows in self.rows[1:])
        else:
            keys, values = (layer.call(x) for layer in self.projections)
        norm = self.module._modules.get("k_norm")
        if norm is not None:
            width = next(norm.parameters()).numel()
            keys = norm(keys.unflatten(-1, (-1, width))).flatten(-2)
        return keys, values
