"""A union (He et al. 2022, arXiv 2110.04366; Mao et al. 2022, arXiv 2110.07577): several methods, one adapter.

    y = leave_n( … leave_1( f( enter_1( … enter_n(x)) ) + Δ_1 ) … + Δ_n )

Every part has its own places and tensors; where two act on one layer they nest, the first innermost. Each part
learns at its own default rate, relative to that of the first, which is the union's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, final

from pydantic import Field, field_validator, model_validator

from trimtab.adapt.contract import Method, Params, Place
from trimtab.adapt.parse import method_from
from trimtab.adapt.rows_beside import RowsBeside
from trimtab.models.anatomy import Anatomy


@final
class Union(RowsBeside):
    """``LoRA(rank=8) | Prefix(length=30)``, or ``Union(parts=("lora(rank=8)", "prefix(length=30)"))``."""

    kind: ClassVar[str] = "union"

    parts: tuple[Any, ...] = Field(min_length=2)
    """The methods, innermost first."""

    @field_validator("parts")
    @classmethod
    def _flat(cls, value: Sequence[Any]) -> tuple[Method, ...]:
        return tuple(part for each in value for part in _parts(method_from(each)))

    @model_validator(mode="after")
    def _of_parts(self) -> Self:
        if self.targets or self.exclude or self.layers is not None or self.layer_drop:
            raise ValueError("targets, exclude, layers and layer_drop are written in the parts")
        return self

    @property
    def members(self) -> tuple[Method, ...]:
        return self.parts

    @property
    def unmergeable(self) -> str:
        found = [f"in its part {p.kind}, {p.unmergeable}" for p in self.parts if p.unmergeable]
        return found[0] if found else ""

    @property
    def default_lr(self) -> float:
        return self.members[0].default_lr

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        return [place for part in self.members for place in part.place(anatomy)]

    def remade(self, members: Sequence[Method]) -> Method:
        return self.replace(parts=tuple(members))

    def plain(self) -> Method:
        return self.replace(parts=tuple(part.plain() for part in self.members))

    def settled(self, shared: Params) -> Method:
        return self.replace(parts=tuple(part.settled(shared) for part in self.members))


def _parts(method: Method) -> tuple[Method, ...]:
    """A union inside a union is its parts; what it trains in full, its last part does."""
    *rest, last = method.members
    return (*rest, last.replace(train=method.train) if rest and method.train else last)
