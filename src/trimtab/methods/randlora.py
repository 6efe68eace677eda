"""RandLoRA (Albert et al. 2025, arXiv 2502.00987): a full-rank sum of random low-rank products, scaled by training.

    ΔW = s · Σ_i B_i diag(λ_i) A diag(γ_i),   s = alpha / rank,   i = 1 … ⌈narrowest side / rank⌉

A and B are drawn from ``seed``, shared by all layers and not stored; A acts on the narrower side of each layer.
λ starts at zero. A ``sparse`` drawing has −1 and 1 at one place in six each and zeros elsewhere, a ``very-sparse`` one
at one in 2√narrowest side (Achlioptas; Li et al. 2006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.biases import Biased
from trimtab.adapt.contract import At, Layer, Params, Place, Spec, constant, zeros
from trimtab.adapt.peft_config import read_options
from trimtab.adapt.weight import columns, dropped
from trimtab.models.anatomy import Anatomy


@final
class RandLoRA(Biased):
    """``RandLoRA(rank=32, alpha=640)``."""

    kind: ClassVar[str] = "randlora"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "RANDLORA"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 32), "randlora_alpha": ("alpha", 640), "projection_prng_key": ("seed", 0),
        "randlora_dropout": ("dropout", 0.0),
    }  # fmt: skip
    peft_lacks: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("save_projection", "sparse", "very_sparse"), ...
    )
    peft_drawn: ClassVar[tuple[str, ...]] = ("randlora_A", "randlora_B")
    disk: ClassVar[Mapping[str, str]] = {n: n for n in ("randlora_lambda", "randlora_gamma")}
    short_names: ClassVar[Mapping[str, str]] = {"randlora_lambda": "l", "randlora_gamma": "g"}
    scales: ClassVar[str] = "l"

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = Field(default=32, ge=1)
    """Rank of each random product."""
    alpha: float = 640.0
    """The sum is multiplied with alpha / rank."""
    seed: int = 0
    """What A and B are drawn from."""
    drawing: Literal["dense", "sparse", "very-sparse"] = "dense"
    """Whether most entries of A and B are zero."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the inputs that are dropped before A or B, in training."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        narrow = _sides(layer)[0]
        count = -(-narrow // self.rank)
        first = constant(1 / max(count, narrow))  # as PEFT's: 1 / the longer side of γ itself
        return {
            "l": Spec("randlora_lambda", (self.rank, count), zeros),
            "g": Spec("randlora_gamma", (count, narrow), first),
        }

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        layers = [anatomy.layer(place.path) for place in places]
        out, into = max(n.shape[0] for n in layers), max(map(columns, layers))
        a = (self.rank, 1, min(out, into))
        b = (max(out, into), -(-min(out, into) // self.rank), self.rank)
        return {
            "A": Spec("randlora_A", a, lambda *_: self._draw(a, b)[0], stored=False),
            "B": Spec("randlora_B", b, lambda *_: self._draw(a, b)[1], stored=False),
        }

    def _draw(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """In PEFT's order (and, if dense, in bfloat16), each divided by its standard deviation."""
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(shape: tuple[int, ...]) -> Tensor:
            empty = torch.empty(shape, dtype=torch.bfloat16)
            return torch.nn.init.kaiming_uniform_(empty, a=5**0.5, generator=generator)

        def signs(shape: tuple[int, ...]) -> Tensor:
            share = 1 / (2 * (3 if self.drawing == "sparse" else a[-1] ** 0.5))
            drawn = torch.rand(shape, generator=generator)
            return (drawn > 1 - share).float() - (drawn < share).float()

        if self.drawing == "dense":
            first = uniform(a)
            second = torch.cat([uniform((b[0], 1, b[2])) for _ in range(b[1])], dim=1)
        else:
            first, second = signs(a), signs(b)
        return (first / first.std()).float(), (second / second.std()).float()

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        zeros = {"sparse": self.drawing == "sparse", "very_sparse": self.drawing == "very-sparse"}
        return {**super().to_peft(places), **zeros, "save_projection": False}

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> RandLoRA | None:
        fields = read_options(config, cls.peft_options, cls.peft_lacks, cls.kind)
        if config.get("very_sparse"):
            return cls(**fields, drawing="very-sparse")
        return cls(**fields, drawing="sparse" if config.get("sparse") else "dense")

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        x = dropped(x, self.dropout, at)
        narrow, wide = _sides(at.layer)
        shared, count = at.shared, p["l"].shape[1]
        a = (p["l"][:, :, None] * shared["A"][:, :, :narrow] * p["g"]).flatten(0, 1)
        b = shared["B"][:wide, :count].flatten(1) * (self.alpha / self.rank)
        into = columns(at.layer) == narrow
        change = b @ a if into else (b @ a).T
        return at.layer.apply(x, change.reshape(at.layer.shape))


def _sides(layer: Layer) -> tuple[int, int]:
    sides = layer.shape[0], columns(layer)
    return min(sides), max(sides)
