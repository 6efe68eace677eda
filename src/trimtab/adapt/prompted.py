"""What methods share that put a prompt before the text, whatever its embeddings come from."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import Method, Params, Place
from trimtab.adapt.encoder import TABLE
from trimtab.adapt.front import ROLE
from trimtab.adapt.reading import input_embedding
from trimtab.errors import TargetError
from trimtab.models.anatomy import Anatomy


class Prompted(Method, ABC):
    """``length`` embeddings, the table that `ready` leaves, stand before the text. Abstract."""

    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = "it puts tokens before the text, which no weight can do"
    peft_root: ClassVar[str] = "base_model."

    length: int = Field(default=20, ge=1)

    @property
    def prompt_tokens(self) -> int:
        return self.length

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        if self.targets or self.exclude or self.layers is not None:
            raise TargetError(
                f"{self.kind} stands before the text and edits no layer: leave out targets, exclude and layers."
            )
        return [Place(input_embedding(anatomy)[0], ROLE)]

    def virtual_embeddings(self, shared: Params) -> Tensor | None:
        return shared[TABLE]

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return []
