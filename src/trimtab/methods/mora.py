"""MoRA (Jiang et al. 2024, arXiv 2405.12130): a square matrix between a compression and an expansion without weights.

    y = f(x) + expand(M compress(x)),   M (r̂, r̂),   r̂ = ⌊√((in + out) · rank) + ½⌋

``rotation`` splits x in groups of r̂, turns group g by the angles of rotary position g, and lays the results side by
side; ``sharing`` adds the groups up and repeats the result. Both repeat from the start to fill the last group. M
starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import Layer, Params, Spec, zeros
from trimtab.adapt.weight import WeightDelta, columns


@final
class MoRA(WeightDelta):
    """``MoRA(rank=8)``: as many parameters as LoRA of that rank."""

    kind: ClassVar[str] = "mora"
    lr: ClassVar[float] = 3e-4
    short_names: ClassVar[Mapping[str, str]] = {"mora_M": "M"}
    scales: ClassVar[str] = "M"
    adds: ClassVar[bool] = True

    rank: int = Field(default=8, ge=1)
    """The rank of the LoRA that has as many parameters."""
    variant: Literal["rotation", "sharing"] = "rotation"
    """How x is compressed."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        side = int(((layer.shape[0] + columns(layer)) * self.rank) ** 0.5 + 0.5)
        if self.variant == "rotation":
            side = max(side // 2 * 2, 2)
        return {"M": Spec("mora_M", (side, side), zeros)}

    def change(self, p: Params, layer: Layer) -> Tensor:
        out, into, side = layer.shape[0], columns(layer), p["M"].shape[0]
        groups = -(-into // side)
        blocks_GSS = p["M"].expand(groups, -1, -1)
        if self.variant == "rotation":
            whole = torch.block_diag(*(blocks_GSS @ _turns(groups, blocks_GSS)))
        else:
            whole = torch.cat(tuple(blocks_GSS), dim=1)
        rows = whole.repeat(-(-out // whole.shape[0]), 1)[:out]
        extra = rows[:, into:]  # these columns see x again from its start
        return rows[:, :into] + torch.nn.functional.pad(extra, (0, into - extra.shape[1]))


def _turns(groups: int, like: Tensor) -> Tensor:
    """The rotation of each group (G, S, S): halves are paired, with the angles g · 10000^(−2k / S)."""
    half = like.shape[-1] // 2
    steps = torch.arange(half, device=like.device, dtype=torch.float64) / half
    angles_GH = torch.arange(groups, device=like.device)[:, None] * 10000.0**-steps
    cos, sin = (torch.diag_embed(f(angles_GH)) for f in (torch.cos, torch.sin))
    return torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1).to(like.dtype)
