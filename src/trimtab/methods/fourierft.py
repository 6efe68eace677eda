"""FourierFT (Gao et al. 2024, arXiv 2405.03003): a few entries of the spectrum of ΔW.

    ΔW = alpha · Re(ifft2(F)),   F zero but for n entries at places drawn from ``seed``

Its entries start from N(0, 1), as in the paper, so it is not the identity at first; ``init="zeros"`` makes it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.biases import Biased
from trimtab.adapt.contract import Layer, Params, Spec, normal, zeros
from trimtab.adapt.weight import WeightDelta, columns
from trimtab.errors import ConfigError


@final
class FourierFT(WeightDelta, Biased):
    """``FourierFT(entries=1000, alpha=150)``."""

    kind: ClassVar[str] = "fourierft"
    called: ClassVar[str] = "fourier"
    lr: ClassVar[float] = 1e-2
    peft_type: ClassVar[str | None] = "FOURIERFT"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "n_frequency": ("entries", 1000), "scaling": ("alpha", 150.0), "random_loc_seed": ("seed", 777),
        "n_frequency_pattern": ("entries_pattern", {}),
    }  # fmt: skip
    patterns: ClassVar[Mapping[str, str]] = {"entries_pattern": "entries"}
    disk: ClassVar[Mapping[str, str]] = {"fourierft_spectrum": "fourierft_spectrum"}
    short_names: ClassVar[Mapping[str, str]] = {"fourierft_spectrum": "spectrum"}
    scales: ClassVar[str] = "spectrum"
    adds: ClassVar[bool] = True

    entries: int = Field(default=1000, ge=1)
    """How many entries of the spectrum are trained at each layer."""
    entries_pattern: Mapping[str, int] = Field(default_factory=dict)
    """End of a path -> how many there."""
    alpha: float = 150.0
    """What the change is multiplied with."""
    seed: int = 777
    """What the places of the entries are drawn from."""
    init: Literal["normal", "zeros"] = "normal"
    """Where entries start: N(0, 1) as in the paper, or zero."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        size = layer.shape[0] * columns(layer)
        if self.entries > size:
            raise ConfigError(
                f"fourierft: {self.entries} entries, but a layer of shape {layer.shape} has only {size}."
            )

        def places(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))[
                : shape[0]
            ]

        return {
            "spectrum": Spec("fourierft_spectrum", (self.entries,), normal(1) if self.init == "normal" else zeros),
            "places": Spec("fourierft_places", (self.entries,), places, cast=False, stored=False),
        }  # fmt: skip

    def change(self, p: Params, layer: Layer) -> Tensor:
        values = layer.wide(p["spectrum"])  # no transform in half precision
        flat = values.new_zeros(layer.shape[0] * columns(layer))
        flat = flat.index_put((p["places"],), values)
        delta = torch.fft.ifft2(flat.view(layer.shape[0], -1)).real * self.alpha
        return delta.to(p["spectrum"].dtype)
