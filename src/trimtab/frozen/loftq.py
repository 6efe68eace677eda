"""A base that is rounded for the low-rank factors beside it (LoftQ, Li et al. 2023, arXiv 2310.08659).

    Q₁ = q(W),   L_t = the best approximation of W − Q_t of rank r,   Q_t+1 = q(W − L_t)

q is NF4 or INT8. Q_T is what is stored; a LoRA with ``init="loftq"`` begins as L_T beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.config import Config, name_and_options
from trimtab.frozen.eightbit import Int8Linear
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.lowbit import LowBitLinear, check_weight
from trimtab.frozen.sample import sample

NAME = "loftq"


@final
class LoftQ(Config):
    """The storage ``loftq(rank=16)``, with ``iters`` and ``bits`` if they are others than these."""

    rank: int = Field(ge=1)
    iters: int = Field(default=5, ge=1)
    bits: Literal[4, 8] = 4

    @classmethod
    def read(cls, text: str) -> LoftQ | None:
        """What a text means; None where it names something else.

        Raises:
            ConfigError, UnknownNameError: it has no such options.
        """
        if not text.startswith(NAME):
            return None
        name, options = name_and_options(text, of="storage")
        return cls.parse(options, where=f"storage {text}") if name == NAME else None

    def __str__(self) -> str:
        bits = "" if self.bits == 4 else f", bits={self.bits}"
        return f"{NAME}(rank={self.rank}, iters={self.iters}{bits})"

    @property
    def kind(self) -> str:
        """The format of what is stored."""
        return "nf4" if self.bits == 4 else "int8"

    def round(self, weight: Tensor, bias: Tensor | None) -> LowBitLinear:
        """The layer that holds Q_T."""
        check_weight(weight)
        wide = weight
        if self.iters > 1 and not weight.is_meta:
            wide = self._wide(weight.float())
        layer = self._once(wide, bias)
        layer.compute_dtype = weight.dtype
        layer.made = str(self)
        layer.was = "" if weight.is_meta else sample(weight)
        return layer

    def _wide(self, weight: Tensor) -> Tensor:
        return compensated(
            weight, self.rank, self.iters, lambda w: self._once(w, None).dense(w.dtype)
        )

    def _once(self, weight: Tensor, bias: Tensor | None) -> LowBitLinear:
        return (FourBitLinear if self.bits == 4 else Int8Linear).of(weight, bias)


def compensated(
    weight: Tensor, rank: int, iters: int, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """W − L_T−1, of which ``rounded`` makes Q_T."""
    found = weight
    for _ in range(iters - 1):
        a, b = nearest(weight - rounded(found), rank)
        found = weight - b @ a
    return found


def nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A_RI and B_OR, whose product B A is the best approximation of this rank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
