"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): train the biases alone.

    y = f(x) + Δb,   Δb starts at 0

A change beside the frozen bias instead of the bias itself: the base stays as it is, and rows with
different adapters share a batch. A base without any bias gets one on every linear layer of its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Place, Spec, zeros
from trimtab.errors import UnsupportedError
from trimtab.models.anatomy import Anatomy


@final
class BitFit(Method):
    """``BitFit()``: all biases outside the head; ``targets`` narrows them (and adds missing ones)."""

    kind: ClassVar[str] = "bitfit"
    lr: ClassVar[float] = 1e-3
    short_names: ClassVar[Mapping[str, str]] = {"bitfit_bias": "b"}
    scales: ClassVar[str] = "b"
    adds: ClassVar[bool] = True

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        if self.targets:
            return super().place(anatomy)
        biased = tuple(path for path in anatomy.biased if path not in anatomy.head)
        if biased:
            narrowed = anatomy.select(biased, self.exclude, self.layers)
            return [Place(path) for path in narrowed]
        linears = tuple(path for path in anatomy.linears if path not in anatomy.experts)
        return [Place(path) for path in anatomy.select(linears, self.exclude, self.layers)]

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if layer.kind == "sublayer":
            raise UnsupportedError(
                "BitFit adds to a layer's bias; a sub-layer without a weight has none."
            )
        return {"b": Spec("bitfit_bias", (layer.out_features,), zeros)}

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return y + at.layer.over_out(p["b"])
