"""VeRA (Kopiczko et al. 2024, arXiv 2310.11454): two trained vectors around random matrices that all layers share.

    y = f(x) + λ_b ⊙ B (λ_d ⊙ (A x)),   A (rank, widest input), B (widest output, rank)

A and B are drawn from ``seed`` and sliced to each layer; only the vectors are trained and stored. λ_b starts at
zero, λ_d at 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.biases import Biased
from trimtab.adapt.contract import At, Layer, Params, Place, Spec, constant, zeros
from trimtab.adapt.weight import columns, dropped
from trimtab.models.anatomy import Anatomy


@final
class VeRA(Biased):
    """``VeRA(rank=256)``."""

    kind: ClassVar[str] = "vera"
    lr: ClassVar[float] = 2e-3
    peft_type: ClassVar[str | None] = "VERA"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 256), "projection_prng_key": ("seed", 0), "vera_dropout": ("dropout", 0.0),
        "d_initial": ("d_initial", 0.1),
    }  # fmt: skip
    peft_lacks: ClassVar[Mapping[str, Any]] = {"save_projection": ...}
    peft_drawn: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")
    disk: ClassVar[Mapping[str, str]] = {n: n for n in ("vera_lambda_b", "vera_lambda_d")}
    short_names: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "b", "vera_lambda_d": "d"}
    scales: ClassVar[str] = "b"

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = Field(default=256, ge=1)
    """Rows of A and columns of B; far higher than LoRA's, since neither is trained."""
    d_initial: float = 0.1
    """First value of λ_d."""
    seed: int = 0
    """What A and B are drawn from; adapters of one seed share them."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the inputs that are dropped before A, in training."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        return {
            "b": Spec("vera_lambda_b", layer.shape[:1], zeros),
            "d": Spec("vera_lambda_d", (self.rank,), constant(self.d_initial)),
        }

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        layers = [anatomy.layer(place.path) for place in places]
        a = (self.rank, max(map(columns, layers)))
        b = (max(layer.shape[0] for layer in layers), self.rank)

        def draw(*shapes: tuple[int, ...]) -> Tensor:
            """The last of several matrices drawn one after the other: He uniform, as PEFT draws them."""
            generator = torch.Generator().manual_seed(self.seed)
            made = [
                torch.nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
                for shape in shapes
            ]
            return made[-1]

        return {
            "A": Spec("vera_A", a, lambda shape, _: draw(shape), stored=False),
            "B": Spec("vera_B", b, lambda shape, _: draw(a, shape), stored=False),
        }

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {**super().to_peft(places), "save_projection": False}

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        x = dropped(x, self.dropout, at)
        shape_a, shape_b = at.layer.factor_shapes(self.rank)
        shared = at.shared
        a = shared["A"][:, : math.prod(shape_a[1:])].reshape(shape_a)
        b = shared["B"][: shape_b[0], : shape_b[1]].reshape(shape_b)
        ones = [1] * (len(shape_a) - 1)
        return at.layer.lowrank(x, a * p["d"].view(-1, *ones), b * p["b"].view(-1, *ones))
