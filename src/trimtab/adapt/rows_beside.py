"""What PEFT has of unions: a LoRA can train rows of embeddings too (``trainable_token_indices``), and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trimtab.adapt.contract import Method, Place
from trimtab.models.anatomy import Anatomy


class RowsBeside(Method):
    """A method of several `members`, which PEFT has where they are a LoRA and chosen tokens."""

    disk_beside: ClassVar[Mapping[str, str]] = {
        "trainable_tokens_delta": "token_adapter.trainable_tokens_delta"
    }

    @property
    def peft_kind(self) -> str | None:
        """``"LORA"``, or None where PEFT lacks the union."""
        first, *rest = self.members
        return (
            "LORA" if first.peft_type == "LORA" and {p.kind for p in rest} == {"tokens"} else None
        )

    @property
    def peft_parts(self) -> int:
        return len(self.members) if self.peft_kind is None else 1

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        if self.peft_kind is None:
            return False
        each = [list(part.place(anatomy)) for part in self.members]
        paths = [place.path for of_part in each for place in of_part if not place.role]
        inside = (part.in_peft(anatomy, of) for part, of in zip(self.members, each, strict=True))
        return all(inside) and len(set(paths)) == len(paths)

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return (
            super().wrapped(places) if self.peft_kind is None else self.members[0].wrapped(places)
        )

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {} if self.peft_kind is None else self.members[0].to_peft(places)
