"""Parallel adapters (He et al. 2022, arXiv 2110.04366): a small MLP beside the feed-forward.

    y = FFN(x) + s · ( W_up σ(W_down x + b_down) + b_up ),   s = 4, or trained from 1 (``scaling="learned"``)

x is what the feed-forward reads: in a pre-norm block the normed states. W_up starts at zero, so that it is the
identity. Where the feed-forward is one module, it is a delta beside it (or beside any linear layer); where it is
split into two layers, W_down acts where the first reads x, and W_up where the second gives its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import (
    At,
    Init,
    Layer,
    Params,
    Place,
    Spec,
    kaiming_uniform,
    ones,
    zeros,
)
from trimtab.adapt.mlp import MLP, Activation, channel_axis
from trimtab.errors import RouteError, UnsupportedError
from trimtab.models.anatomy import Anatomy

INPUT, OUTPUT = "input", "output"


@final
class Parallel(MLP):
    """``Parallel(reduction=2)``: beside the feed-forward of every block; ``targets`` names other layers."""

    kind: ClassVar[str] = "parallel"
    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = "it passes hidden states through a non-linear activation"
    lr: ClassVar[float] = 1e-4
    inits: ClassVar[tuple[Init, Init]] = (kaiming_uniform, zeros)

    reduction: int | None = Field(default=2, ge=1)
    """The width divided by it is the size of the middle."""
    activation: Activation = "relu"
    """The σ between the two maps."""
    scaling: float | Literal["learned"] = 4.0
    """The s before the change; ``learned`` trains it."""

    @property
    def factor(self) -> float:
        return 1.0 if self.scaling == "learned" else self.scaling

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        if self.targets:
            return super().place(anatomy)
        first = anatomy.select("mlp_input", self.exclude, self.layers)
        split = [path for path in first if anatomy.weighted(path)]
        if not split:
            return [Place(path) for path in first]
        last = anatomy.select("mlp_output", self.exclude, self.layers)
        if len(split) != len(first) or len(last) != len(first):
            raise UnsupportedError(
                f"parallel: {len(first)} feed-forwards begin and {len(last)} end here; name whole modules as targets."
            )
        return [*(Place(path, INPUT) for path in first), *(Place(path, OUTPUT) for path in last)]

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        reads, gives = layer.in_features, layer.out_features
        if layer.kind == "embedding" or not reads or channel_axis(layer) != -1:
            raise UnsupportedError(
                f"parallel: beside a layer of kind {layer.kind} it would need inputs of a known width, position by "
                "position; choose linear layers or whole feed-forwards."
            )
        below = {} if role == OUTPUT else self.downward(reads)
        if role == INPUT:
            return below
        size = self.size_at(gives) if role == OUTPUT else self.size_at(reads)
        above = self.replace(size=size).upward(gives)
        scale = {"s": Spec("adapter_scale", (1,), ones)} if self.scaling == "learned" else {}
        return {**below, **above, **scale}

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        if at.role == INPUT:
            at.scratch[at.name, at.part.owner, at.index] = self.inner(p, x)
        return x

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.role == INPUT:
            return None
        if at.role == OUTPUT:
            inner = at.scratch.pop((at.name, at.part.owner, at.index), None)
            if inner is None:
                raise RouteError(
                    f"adapter {at.name!r}: {at.path} is reached outside a forward of the model, so what its "
                    "feed-forward read is not known. Call the model, or wrap the call in trimtab.captured."
                )
            return self.outer(p, inner)
        return self.outer(p, self.inner(p, x))
