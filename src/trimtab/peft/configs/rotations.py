"""Configurations of methods that rotate what a layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.adapt.contract import Init, kaiming_uniform, normal
from trimtab.errors import ConfigError
from trimtab.peft.config import config, option
from trimtab.peft.configs.common import Excluding, Layered, Transposed, Unbiased
from trimtab.peft.types import PeftType

_IDENTITY = "Begin at the identity; False begins at random."


@config(PeftType.OFT)
class OFTConfig(Excluding, Layered, Transposed, Unbiased):
    """OFT: orthogonal rotation of the input, block by block."""

    prefix: ClassVar[str] = "oft_"
    lacks: ClassVar[dict[str, str]] = {
        **Unbiased.lacks,
        "module_dropout": "",
        "coft": "Trimtab bounds rotations after each step: UnionConfig(parts='oft(epsilon=6e-5)').",
    }

    r: int = option("How many blocks, instead of their size.", default=0)
    oft_block_size: int = option("Size of the blocks.", default=32)
    module_dropout: float = option("Not in Trimtab.", default=0.0)
    init_weights: bool = option(_IDENTITY, default=True)
    coft: bool = option("Not in Trimtab.", default=False)
    eps: float = option("Of coft; no effect.", default=6e-5)
    block_share: bool = option("One rotation for all blocks.", default=False)
    use_cayley_neumann: bool = option("Make rotations by a series of five terms.", default=True)
    num_cayley_neumann_terms: int = option("Terms of that series: only 5.", default=5)
    bias: Literal["none", "all", "oft_only"] = option(
        "Biases that are trained too: only 'none'.", default="none"
    )

    def check(self) -> None:
        super().check()
        if bool(self.r) == bool(self.oft_block_size) or min(self.r, self.oft_block_size) < 0:
            raise ConfigError(
                f"OFTConfig: give either r, a number of blocks, or oft_block_size (the other being 0), not r={self.r} "
                f"and oft_block_size={self.oft_block_size}."
            )

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"oft_R.weight": normal(0.1)}


@config(PeftType.BOFT)
class BOFTConfig(Excluding, Layered, Transposed, Unbiased):
    """BOFT: sparse rotations in butterfly order, and output scales."""

    prefix: ClassVar[str] = "boft_"
    lacks: ClassVar[dict[str, str]] = {
        **Unbiased.lacks,
        "boft_block_num": "Give boft_block_size: the inputs of a layer divided by the number of blocks.",
        "boft_dropout": "",
    }

    boft_block_size: int = option("Size of the blocks.", default=4)
    boft_block_num: int = option("Not in Trimtab.", default=0)
    boft_n_butterfly_factor: int = option("How many factors are multiplied.", default=1)
    boft_dropout: float = option("Not in Trimtab.", default=0.0)
    init_weights: bool = option(_IDENTITY, default=True)

    sizes: ClassVar[tuple[str, ...]] = ("boft_block_size", "boft_n_butterfly_factor")

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"boft_R": normal(0.1), "boft_s": _around_one}


@config(PeftType.HRA)
class HRAConfig(Excluding, Layered, Unbiased):
    """HRA: a chain of Householder reflections of the input."""

    prefix: ClassVar[str] = "hra_"
    sizes: ClassVar[tuple[str, ...]] = ("r",)

    r: int = option("How many reflections; an even number begins at the identity.", default=8)
    apply_GS: bool = option("Make them orthogonal to each other.", default=False)
    init_weights: bool = option(_IDENTITY, default=True)

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"hra_u": kaiming_uniform}


def _around_one(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(1, 0.1²)."""
    return 1 + 0.1 * torch.randn(shape, generator=generator)
