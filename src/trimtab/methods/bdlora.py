"""BD-LoRA (Wang et al. 2025, arXiv 2510.23346): one of the two factors is block-diagonal, for sharded serving.

    ΔW = s · B diag(A₁, …, Aₙ)   or   s · diag(B₁, …, Bₙ) A

Where a server splits the inputs (or the outputs) of a layer among n devices, each needs its own block alone. The
blocks are stored one below another: A is (rank, in / n), B is (out, rank / n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, final

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Place, Spec, uniform
from trimtab.adapt.lowrank import BIASES
from trimtab.adapt.variant import Variant
from trimtab.errors import ConfigError, TargetError
from trimtab.models.anatomy import Anatomy

ALL = ("",)
"""What every name contains."""


@final
class BDLoRA(Variant):
    """``BDLoRA(rank=16, blocks=4, block_a=["o_proj", "down_proj"])``; other fields as LoRA's."""

    kind: ClassVar[str] = "bdlora"
    variant: ClassVar[str] = "use_bdlora"
    offsets: ClassVar[bool] = False
    starts: ClassVar[Any] = "in its own way"
    parts: ClassVar[Mapping[str, str]] = {
        "target_modules_bd_a": "block_a", "target_modules_bd_b": "block_b", "nblocks": "blocks",
        "match_strict": "strict",
    }  # fmt: skip
    linear_only: ClassVar[str] = "splits the inputs or outputs among blocks"

    blocks: int = Field(default=2, ge=1)
    """n, how many blocks the factor has."""
    block_a: tuple[str, ...] = ()
    """Where A is block-diagonal: layers whose own names contain one of these."""
    block_b: tuple[str, ...] = ALL
    """Where B is, likewise; by default wherever A is not."""
    strict: bool = True
    """Refuse a layer in which neither is; else it has a plain LoRA."""

    @field_validator("block_a", "block_b", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(value or ()) if isinstance(value, list | set | None) else value

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        places = super().place(anatomy)
        for path in self.wrapped(places):
            a, b = self._sides(path)
            if a and b:
                raise TargetError(
                    f"bdlora: {path!r} is named by both block_a and block_b; one of the factors can have blocks."
                )
            if self.strict and not (a or b):
                raise TargetError(
                    f"bdlora: {path!r} is named by neither block_a nor block_b; name it, leave it out of the targets, "
                    "or say strict=False, and it has a plain LoRA."
                )
        return places

    def at(self, path: str) -> Self:
        a, b = self._sides(path)
        return super().at(path).replace(block_a=ALL * a, block_b=ALL * b)

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs, n = super().tensors(layer, role), self.blocks
        if role in BIASES or not (self.block_a or self.block_b):
            return specs
        width = layer.in_features if self.block_a else layer.out_features
        if width % n or self.rank % n:
            raise ConfigError(
                f"bdlora: neither the rank {self.rank} nor the width {width} of a layer may have a rest when it is "
                f"split into {n} blocks; choose other blocks or another rank."
            )
        if self.block_b:
            return {**specs, "B": replace(specs["B"], shape=(width, self.rank // n))}
        first = uniform((6 * n / width) ** 0.5)
        return {**specs, "A": replace(specs["A"], shape=(self.rank, width // n), init=first)}

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        a, b = p["A"], p["B"] * self.scaling
        if self.block_a:
            return _diagonal(a, self.blocks), b
        return a, _diagonal(b, self.blocks) if self.block_b else b

    def change(self, p: Params, x: Tensor, at: At) -> Tensor:
        b = p["B"] * self.scaling
        if self.block_a:
            return F.linear(_by_blocks(x, p["A"], self.blocks), b)
        inner = F.linear(x, p["A"])
        return _by_blocks(inner, b, self.blocks) if self.block_b else F.linear(inner, b)

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        """PEFT looks for our names in others too."""
        said = self._said(places)
        found = {
            path: tuple(any(part in path.rpartition(".")[2] for part in names) for names in said)
            for path in self.wrapped(places)
        }
        same = all(found[path] == self._sides(path) for path in found)
        return super().in_peft(anatomy, places) and same

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        a, b = self._said(places)
        found = super().to_peft(places)
        named = {"target_modules_bd_a": a or None, "target_modules_bd_b": b or None}
        return {**found, self.variant: {**found[self.variant], **named}}

    @classmethod
    def fields_of_variant(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"blocks": 1, "block_b": (), **super().fields_of_variant(config)}

    def _sides(self, path: str) -> tuple[bool, bool]:
        """Whether A, or B, is block-diagonal at a site."""
        name = path.rpartition(".")[2]
        a, b = (any(part in name for part in names) for names in (self.block_a, self.block_b))
        return a, b and not (a and self.block_b == ALL)

    def _said(self, places: Sequence[Place]) -> tuple[list[str], list[str]]:
        """The two lists as PEFT takes them: a list of all others by their names."""
        if self.block_b != ALL:
            return list(self.block_a), list(self.block_b)
        paths = self.wrapped(places)
        others = {path.rpartition(".")[2] for path in paths if self._sides(path)[1]}
        return list(self.block_a), sorted(others)


def _diagonal(rows: Tensor, n: int) -> Tensor:
    """Blocks one below another (…, n R, C) -> block-diagonal (…, n R, n C)."""
    blocks = rows.unflatten(-2, (n, -1))
    eye = torch.eye(n, dtype=rows.dtype, device=rows.device)
    return torch.einsum("...nrc,nm->...nrmc", blocks, eye).flatten(-2).flatten(-3, -2)


def _by_blocks(x: Tensor, rows: Tensor, n: int) -> Tensor:
    """x_..(nI) through n blocks of a matrix (n O, I)."""
    x = x.unflatten(-1, (n, -1))
    return torch.einsum("...ni,noi->...no", x, rows.unflatten(0, (n, -1))).flatten(-2)
