"""MiSS (Kang and Yin 2024, arXiv 2409.15371, "Bone"): one small matrix shared by all blocks of the weight's rows.

    ΔW = [D D … D],   D (out, rank);      ``bat``:  ΔW_gh = W_gh D_g + D_g   for blocks (rank, rank)

``mini`` repeats the columns of a still smaller D (``mini`` of them) over the outputs. D starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from trimtab.adapt.biases import Biased
from trimtab.adapt.contract import Layer, Params, Spec, zeros
from trimtab.adapt.peft_config import read_options
from trimtab.adapt.weight import Dropping, columns
from trimtab.errors import ConfigError


@final
class MiSS(Dropping, Biased):
    """``MiSS(rank=64)``; ``variant="bat"`` mixes the weight's own blocks in."""

    kind: ClassVar[str] = "miss"
    called: ClassVar[str] = "MiSS"
    lr: ClassVar[float] = 2e-4
    peft_type: ClassVar[str | None] = "MISS"
    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 64), "mini_r": ("mini", 1), "init_weights": ("variant", True), "miss_dropout": ("dropout", 0.0),
    }  # fmt: skip
    disk: ClassVar[Mapping[str, str]] = {"miss_block": "miss_block"}
    short_names: ClassVar[Mapping[str, str]] = {"miss_block": "D"}
    scales: ClassVar[str] = "D"
    adds: ClassVar[bool] = True

    rank: int = Field(default=64, ge=1)
    """Width of the shared matrix."""
    variant: Literal["shared", "bat", "mini"] = "shared"
    """Whether D is added as it is, mixed with the blocks of the weight, or still smaller."""
    mini: int = Field(default=1, ge=1)
    """Columns of D in the variant `mini`."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        out, into = layer.shape[0], columns(layer)
        uneven = {
            "shared": self.rank > into,
            "bat": bool(out % self.rank or into % self.rank),
            "mini": self.rank > into or bool(out % self.mini),
        }
        if uneven[self.variant]:
            raise ConfigError(
                f"miss: rank {self.rank} (mini {self.mini}) does not divide a layer of shape {layer.shape}; "
                "choose another rank, or leave the layer out."
            )
        shapes: dict[str, tuple[int, ...]] = {
            "shared": (self.rank, out),
            "bat": (out // self.rank, self.rank, self.rank),
            "mini": (self.rank, self.mini),
        }
        return {"D": Spec("miss_block", shapes[self.variant], zeros)}

    def change(self, p: Params, layer: Layer) -> Tensor:
        out, into, d = layer.shape[0], columns(layer), p["D"]
        if self.variant == "bat":
            blocks = layer.dense().to(d.dtype).reshape(out // self.rank, self.rank, -1, self.rank)
            return (
                (blocks.transpose(1, 2) @ d[:, None] + d[:, None])
                .transpose(1, 2)
                .reshape(out, into)
            )
        rows = d.T.repeat(out // d.shape[1], 1)
        return rows.repeat(1, -(-into // self.rank))[:, :into]

    def to_peft(self, places: Any) -> dict[str, Any]:
        return {
            **super().to_peft(places),
            "init_weights": True if self.variant == "shared" else self.variant,
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> MiSS | None:
        fields = read_options(config, cls.peft_options, cls.peft_lacks, cls.kind)
        if not isinstance(fields["variant"], str):
            fields["variant"] = "shared"
        return cls(**fields)
