"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on the direction of each output channel, and its magnitude.

    y = b + m / ‖W + s B A‖ · (W x + s B A x)

The norm (per output channel) is a constant in backward, as in the paper; m starts at ‖W‖, so that the
method is the identity at first. It is found without building B A:

    ‖W + s B A‖² = ‖W‖² + 2 s ⟨W, B A⟩ + s² ‖B A‖²

with ‖W‖² computed once; without gradients, the whole factor m / ‖·‖ is kept until a tensor changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, final

import torch
from pydantic import model_validator
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Place, Spec, copy_of
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.errors import UnsupportedError
from trimtab.kernels.channels import stretched


@final
class DoRA(LowRank):
    """``DoRA(rank=16, alpha=32)``; fields as LoRA's."""

    kind: ClassVar[str] = "dora"
    lr: ClassVar[float] = 1e-4
    variant: ClassVar[str] = "use_dora"
    fuses: ClassVar[bool] = True
    offsets: ClassVar[bool] = False  # its output is rescaled, and an offset would be too
    disk: ClassVar[Mapping[str, str]] = {
        **LowRank.disk,
        "lora_magnitude_vector.weight": "lora_magnitude_vector",
    }

    @model_validator(mode="after")
    def _own_base(self) -> Self:
        if self.rebased:
            raise ValueError(
                f"init {self.init} computes beside another weight than the base's, whose norm DoRA would need densely "
                "at each step; use LoRA"
            )
        return self

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs = super().tensors(layer, role)
        if role in BIASES:
            return specs
        kernel = len(specs["A"].shape) - 2
        shape = (1, layer.out_features, *(1,) * kernel) if kernel else (layer.out_features,)

        def norms(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            """The norm of each output channel's weights."""
            return copy_of(layer.row_norms())(shape, generator)

        # m stays in fp32: in bf16 the factor would move in steps of 0.4 % only.
        return {**specs, "m": Spec("lora_magnitude_vector.weight", shape, norms, cast=False)}

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        if at.role in BIASES:
            return super().leave(p, y, at)
        change = at.kept("change", lambda: self._factor(p, at.layer) - 1)
        bias = at.layer.bias()
        return stretched(
            y, at.layer.over_out(change), None if bias is None else at.layer.over_out(bias)
        )

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        if role in BIASES:
            return super().merged(p, layer, role)
        factor = self._factor(p, layer)
        weight = layer.dense() + self.product(p, layer)
        return weight * factor.reshape(-1, *(1,) * (weight.dim() - 1)), layer.bias()

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        raise UnsupportedError(
            "dora: its output is divided by a norm of its own factors, so it cannot be scaled."
        )

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        raise UnsupportedError(
            "dora: each adapter normalises the whole weight, so two of them have no sum."
        )

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {**super().to_peft(places), "use_dora": True}

    def _factor(self, p: Params, layer: Layer) -> Tensor:
        with torch.no_grad():
            norms = layer.edited_row_norms(*self.whole(p))
        return p["m"].flatten() / norms
