"""What methods share that train a prompt, whatever its embeddings come from."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Method, Params, Place
from trimtab.adapt.encoder import TABLE
from trimtab.adapt.front import ROLE
from trimtab.adapt.reading import input_embedding
from trimtab.errors import TargetError
from trimtab.models.anatomy import Anatomy


class Prompted(Method, ABC):
    """``length`` embeddings, the table that `ready` leaves, stand before the text. Abstract.

    With ``placeholder`` they stand in the text instead: the k-th token of that id in each unit takes the k-th of
    them (and begins anew after the last), as in the templates of P-tuning. Nothing is put before the text then.
    """

    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = "it puts tokens before the text, which no weight can do"
    peft_root: ClassVar[str] = "base_model."

    length: int = Field(default=20, ge=1)
    """How many virtual tokens."""
    placeholder: int | None = Field(default=None, ge=0)
    """Id of the token that stands for them in the text; none puts them before the text."""

    @property
    def prompt_tokens(self) -> int:
        return self.length if self.placeholder is None else 0

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        if self.targets or self.exclude or self.layers is not None:
            raise TargetError(
                f"{self.kind} stands before the text and edits no layer: leave out targets, exclude and layers."
            )
        return [Place(input_embedding(anatomy)[0], ROLE if self.placeholder is None else "")]

    def virtual_embeddings(self, shared: Params) -> Tensor | None:
        return shared[TABLE]

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        """In the text: the embeddings of placeholders are the prompt's."""
        here = at.x.eq(cast(int, self.placeholder))
        chosen = at.shared[TABLE][(_earlier(here, at) % self.length)].to(y.dtype)
        return torch.where(here[..., None], chosen, y)

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return []

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        return self.placeholder is None


def _earlier(here: Tensor, at: At) -> Tensor:
    """How many placeholders precede each token in its own unit."""
    if here.dim() > 1:
        return here.cumsum(1) - here.long()
    units = at.part.units
    before = here.cumsum(0) - here.long()
    if units is None:
        return before
    first = torch.full((at.part.unit_count,), len(here), device=here.device)
    first = first.scatter_reduce(0, units.to(here.device), before, "amin")
    return before - first[units.to(here.device)]
