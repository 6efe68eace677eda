"""Variants of LoRA whose change is a product of two factors, and so a plain LoRA once training is over.

ΔW = B' A',   `whole` says which;   shared as the LoRA of these, with a scaling of 1

Where the initialisation is meant beside another weight W', that LoRA begins so too, and B' A' are meant beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor

from trimtab.adapt.biases import SLOTS
from trimtab.adapt.contract import Layer, Method, Place, Spec
from trimtab.adapt.factors import EMBEDDED, FACTORS, OFFSET
from trimtab.adapt.initial import DEFAULT
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.parse import method_from
from trimtab.adapt.peft_config import CONFIG
from trimtab.errors import FileFormatError, TargetError


class Variant(LowRank):
    """What they share: PEFT reads them as they are, their plain form is a LoRA, and so is a sum of them."""

    peft_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    parts: ClassVar[Mapping[str, str]] = {}
    """PEFT's options below that of the variant -> our fields."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Those of them that change nothing here."""
    linear_only: ClassVar[str] = ""
    """Why it acts on linear layers alone, where it does."""
    starts: ClassVar[Literal["anywhere", "at zero", "in its own way"]] = "anywhere"
    """Where its factors may begin."""

    @model_validator(mode="after")
    def _begins(self) -> Self:
        own = self.starts == "in its own way" and self.init != DEFAULT
        moved = self._start is not None and (self._away or self.rebased or self._start.done)
        if own or (self.starts == "at zero" and moved):
            raise ValueError(f"{self.kind} begins {self.starts}, and so not as {self.init}")
        return self

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs = super().tensors(layer, role)
        if self.linear_only and role not in BIASES and layer.kind != "linear":
            raise TargetError(
                f"{self.kind} {self.linear_only}, and this is a layer of kind {layer.kind!r}; target linear layers."
            )
        return specs

    @property
    def peft_reads(self) -> bool:
        return not self._away  # PEFT would take the first factors out of its base again

    def plain(self) -> Method:
        own = {name: value for name, value in self if name in LowRank.model_fields}
        times = self.plain_rank // self.rank
        ranks = {path: times * rank for path, rank in self.rank_pattern.items()}
        changes: dict[str, Any] = {
            "init": self.init if self.rebased else DEFAULT,
            "rank": times * self.rank,
            "alpha": float(times * self.rank),
            "rslora": False,
            "rank_pattern": ranks,
            "alpha_pattern": {path: float(rank) for path, rank in ranks.items()},
        }
        return method_from({"kind": "lora", **own, **changes})

    def summed(self, **changes: Any) -> Method:
        return self.plain().replace(**changes)

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        slots = next((s for s in (FACTORS, EMBEDDED) if s[0] in tensors), None)
        if slots is None:
            return dict(tensors)
        p = {self.short_names[slot]: tensor for slot, tensor in tensors.items()}
        offset = self.offset(p)
        rest = {slot: t for slot, t in tensors.items() if slot in SLOTS.values()}
        own = {} if offset is None else {OFFSET: offset}
        factors = self.factors(p) if self.rebased else self.whole(p)
        return {**rest, **own, **dict(zip(slots[:2], factors, strict=True))}

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {**super().to_peft(places), **self.variant_to_peft()}

    def variant_to_peft(self) -> dict[str, Any]:
        """PEFT's options of the variant."""
        own = dict(self)
        return {self.variant: {theirs: own[ours] for theirs, ours in self.parts.items()}}

    @classmethod
    def fields_of_variant(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(config[cls.variant])
        for name in given:
            if name not in cls.parts and name not in cls.unused:
                raise FileFormatError(
                    f"{CONFIG}: unknown option {name!r} of {cls.variant}; a newer PEFT wrote it."
                )
        return {cls.parts[name]: value for name, value in given.items() if name in cls.parts}
