"""Configurations of methods that rotate what a layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.adapt.contract import Init, kaiming_uniform, normal
from trimtab.errors import ConfigError
from trimtab.peft.config import config, option
from trimtab.peft.configs.common import Biased, Excluding, Layered, Transposed
from trimtab.peft.types import PeftType

SLOTS = ("oft_R.weight", "oft_embedding_R.weight")
_IDENTITY = "Begin at the identity; False begins at random."


@config(PeftType.OFT)
class OFTConfig(Excluding, Layered, Transposed, Biased):
    """OFT: orthogonal rotation of the input, block by block."""

    prefix: ClassVar[str] = "oft_"
    sizes: ClassVar[tuple[str, ...]] = ("num_cayley_neumann_terms",)
    shares: ClassVar[tuple[str, ...]] = ("module_dropout",)

    r: int = option("How many blocks, instead of their size.", default=0)
    oft_block_size: int = option("Size of the blocks.", default=32)
    module_dropout: float = option(
        "Share of the blocks, rounded down, that do not turn, in training. (PEFT does nothing with it.)",
        default=0.0,
    )
    init_weights: bool = option(_IDENTITY, default=True)
    coft: bool = option("Constrained OFT: keep rotations near the identity.", default=False)
    eps: float = option("How near, with coft.", default=6e-5)
    block_share: bool = option("One rotation for all blocks.", default=False)
    use_cayley_neumann: bool = option("Make rotations by a series.", default=True)
    num_cayley_neumann_terms: int = option(
        "Terms of that series, from 2 on; 4 are the same as 3.", default=5
    )

    def check(self) -> None:
        super().check()
        _one_of(type(self).__name__, r=self.r, oft_block_size=self.oft_block_size)
        if self.num_cayley_neumann_terms < 2:
            raise ConfigError(
                "OFTConfig: a series of one term does not turn anything; give num_cayley_neumann_terms=2 or more."
            )
        if self.coft and not self.eps > 0:
            raise ConfigError(f"OFTConfig: eps must be above 0, not {self.eps!r}.")

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else dict.fromkeys(SLOTS, normal(0.1))


@config(PeftType.BOFT)
class BOFTConfig(Excluding, Layered, Transposed, Biased):
    """BOFT: sparse rotations in butterfly order, and output scales."""

    prefix: ClassVar[str] = "boft_"
    boft_block_size: int = option("Size of the blocks.", default=4)
    boft_block_num: int = option(
        "How many blocks, instead of their size, which is 0 then.", default=0
    )
    boft_n_butterfly_factor: int = option("How many factors are multiplied.", default=1)
    boft_dropout: float = option(
        "Share of the blocks of one factor, rounded down, that do not turn, in training.",
        default=0.0,
    )
    init_weights: bool = option(_IDENTITY, default=True)

    sizes: ClassVar[tuple[str, ...]] = ("boft_n_butterfly_factor",)
    shares: ClassVar[tuple[str, ...]] = ("boft_dropout",)

    def check(self) -> None:
        super().check()
        _one_of(
            type(self).__name__,
            boft_block_num=self.boft_block_num,
            boft_block_size=self.boft_block_size,
        )

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"boft_R": normal(0.1), "boft_s": _around_one}


@config(PeftType.HRA)
class HRAConfig(Excluding, Layered, Biased):
    """HRA: a chain of Householder reflections of the input."""

    prefix: ClassVar[str] = "hra_"
    sizes: ClassVar[tuple[str, ...]] = ("r",)

    r: int = option("How many reflections; an even number begins at the identity.", default=8)
    apply_GS: bool = option("Make them orthogonal to each other.", default=False)
    init_weights: bool = option(_IDENTITY, default=True)

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"hra_u": kaiming_uniform}


def _one_of(kind: str, **sizes: int) -> None:
    """Either a number of blocks or their size, the other being 0."""
    if min(sizes.values()) < 0 or sum(map(bool, sizes.values())) != 1:
        count, size = sizes
        said = " and ".join(f"{name}={value}" for name, value in sizes.items())
        raise ConfigError(
            f"{kind}: give either {count}, a number of blocks, or {size} (the other being 0), not {said}."
        )


def _around_one(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(1, 0.1²)."""
    return 1 + 0.1 * torch.randn(shape, generator=generator)
