"""Configurations of methods that add a matrix to a weight in another form than LoRA's product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from trimtab.adapt.contract import Init, Method, kaiming_uniform, normal, ones, zeros
from trimtab.errors import ConfigError
from trimtab.peft.config import config, option
from trimtab.peft.configs.common import Biased, Excluding, Layered, Transposed
from trimtab.peft.types import PeftType

_IDENTITY = "Begin at the identity; False begins at random."


@config()
class Lycoris(Excluding, Layered):
    """What LoHa and LoKr share."""

    sizes: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("rank_dropout", "module_dropout")

    r: int = option("Rank of the factors.", default=8)
    alpha: float = option("The change is scaled by alpha / r.", default=8)
    rank_dropout: float = option("Share of rows of the change left out, in training.", default=0.0)
    module_dropout: float = option("How often the change is left out, in training.", default=0.0)
    use_effective_conv2d: bool = option(
        "In convolutions, a small core for the kernel between factors for the channels.",
        default=False,
    )
    rank_pattern: dict[str, int] | None = option("End of a module's name -> its rank.", default={})
    alpha_pattern: dict[str, float] | None = option(
        "End of a module's name -> its alpha.", default={}
    )


@config(PeftType.LOHA)
class LoHaConfig(Lycoris):
    """LoHa: the Hadamard product of two low-rank matrices."""

    prefix: ClassVar[str] = "hada_"

    init_weights: bool = option(_IDENTITY, default=True)

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"hada_w2_b": kaiming_uniform}


@config(PeftType.LOKR)
class LoKrConfig(Lycoris):
    """LoKr: a Kronecker product."""

    prefix: ClassVar[str] = "lokr_"

    decompose_both: bool = option("Split the first matrix into factors too.", default=False)
    decompose_factor: int = option("Size of the first factor of each side; -1 is even.", default=-1)
    rank_dropout_scale: bool = option(
        "Let the rows that are left grow by as much as rank_dropout took away.", default=False
    )
    init_weights: bool | Literal["lycoris"] = option(
        f"{_IDENTITY} 'lycoris' begins at the identity with the second matrix at zero.",
        default=True,
    )

    def check(self) -> None:
        super().check()
        if self.init_weights not in (True, False, "lycoris"):
            raise ConfigError(
                f"LoKrConfig: init_weights is True, False or 'lycoris', not {self.init_weights!r}."
            )

    def first_values(self) -> Mapping[str, Init]:
        if self.init_weights is True:
            return {}
        first = dict.fromkeys(("lokr_w1", "lokr_w1_a"), kaiming_uniform)
        second = dict.fromkeys(("lokr_w2", "lokr_w2_b"), zeros)
        return first | (second if self.init_weights else {})


@config(PeftType.HIRA)
class HiraConfig(Excluding, Layered, Transposed):
    """HiRA: a low-rank change in proportion to the weight."""

    prefix: ClassVar[str] = "hira_"
    sizes: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("hira_dropout",)

    r: int = option("Rank of the factors.", default=32)
    hira_dropout: float = option("Of the inputs, in training.", default=0.0)
    init_weights: bool | Literal["gaussian"] | None = option(
        f"{_IDENTITY} 'gaussian' draws A from N(0, 1 / r²).", default=True
    )
    rank_pattern: dict[str, int] | None = option(
        "End of a module's name -> its rank. (PEFT does nothing with it, but where a HiRA is there already.)",
        default={},
    )

    def check(self) -> None:
        super().check()
        if self.init_weights not in (True, False, None, "gaussian"):
            raise ConfigError(
                f"HiraConfig: init_weights is True, False or 'gaussian', not {self.init_weights!r}."
            )

    def first_values(self) -> Mapping[str, Init]:
        if self.init_weights is True:
            return {}
        if self.init_weights == "gaussian":
            return {"hira_A": normal(1 / self.r)}
        return dict.fromkeys(
            ("hira_A", "hira_B"), normal(1.0)
        )  # an embedding's are the same in any case


@config(PeftType.FOURIERFT)
class FourierFTConfig(Excluding, Layered, Transposed, Biased):
    """FourierFT: a few entries of the spectrum of the change."""

    prefix: ClassVar[str] = "fourierft_"
    sizes: ClassVar[tuple[str, ...]] = ("n_frequency",)

    n_frequency: int = option("How many entries are trained at each layer.", default=1000)
    scaling: float = option("What the change is multiplied with.", default=150.0)
    random_loc_seed: int | None = option(
        "What the places of the entries are drawn from.", default=777
    )
    n_frequency_pattern: dict[str, int] | None = option(
        "End of a module's name -> how many there.", default={}
    )
    init_weights: bool = option("Begin at zero, not from N(0, 1).", default=False)

    def begun(self, method: Method, model: nn.Module) -> Method:
        return method.replace(init="zeros" if self.init_weights else "normal")


@config(PeftType.MISS)
class MissConfig(Excluding, Layered, Biased):
    """MiSS: one small matrix shared by all blocks of the weight's rows."""

    prefix: ClassVar[str] = "miss_"
    sizes: ClassVar[tuple[str, ...]] = ("r", "mini_r")
    shares: ClassVar[tuple[str, ...]] = ("miss_dropout",)

    r: int = option("Width of the shared matrix.", default=64)
    miss_dropout: float = option(
        "Of the inputs, in training. (PEFT does nothing with it for 'bat'.)", default=0.0
    )
    mini_r: int = option("Columns of the still smaller one of 'mini'.", default=1)
    init_weights: bool | Literal["bat", "mini"] = option(
        f"{_IDENTITY} 'bat' and 'mini' are other forms.", default=True
    )

    def check(self) -> None:
        super().check()
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ConfigError(
                f"MissConfig: init_weights is True, False, 'bat' or 'mini', not {self.init_weights!r}."
            )

    def first_values(self) -> Mapping[str, Init]:
        return {"miss_block": kaiming_uniform} if self.init_weights is False else {}


@config(PeftType.SHIRA)
class ShiraConfig(Transposed):
    """SHiRA: a few weights of each matrix."""

    prefix: ClassVar[str] = "shira_"
    sizes: ClassVar[tuple[str, ...]] = ("r",)

    r: int = option("A matrix has r · (in + out) trained values.", default=32)
    mask_type: Literal["random"] = option("How places are chosen: 'random'.", default="random")
    random_seed: int | None = option("Of the places; none is that of torch.", default=None)
    init_weights: bool = option(_IDENTITY, default=True)

    def check(self) -> None:
        super().check()
        if self.mask_type != "random":
            raise ConfigError(
                f"ShiraConfig: mask_type={self.mask_type!r}: PEFT's is 'random'. Trimtab's SHiRA has the masks "
                "'magnitude' and 'fisher' too: UnionConfig(parts=\"shira(mask='magnitude')\")."
            )

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"shira_weight": normal(1.0)}


@config()
class _Projected(Layered, Transposed, Biased):
    """Random matrices that a seed gives, shared by all layers."""

    sizes: ClassVar[tuple[str, ...]] = ("r",)

    projection_prng_key: int = option("What the random matrices are drawn from.", default=0)
    save_projection: bool = option(
        "No effect: they are never written, as the seed gives them.", default=True
    )


@config(PeftType.VERA)
class VeraConfig(_Projected):
    """VeRA: two trained vectors around random matrices."""

    prefix: ClassVar[str] = "vera_lambda_"
    shares: ClassVar[tuple[str, ...]] = ("vera_dropout",)

    r: int = option("Rank of the random matrices.", default=256)
    vera_dropout: float = option("Of the inputs, in training.", default=0.0)
    d_initial: float = option("First value of the inner vector.", default=0.1)
    init_weights: bool = option(_IDENTITY, default=True)

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"vera_lambda_b": ones, "vera_lambda_d": normal(1.0)}


@config(PeftType.RANDLORA)
class RandLoraConfig(_Projected):
    """RandLoRA: a full-rank sum of random products, scaled by training."""

    prefix: ClassVar[str] = "randlora_"
    shares: ClassVar[tuple[str, ...]] = ("randlora_dropout",)

    r: int = option("Rank of each random product.", default=32)
    randlora_alpha: int = option("The sum is scaled by randlora_alpha / r.", default=640)
    sparse: bool = option("Draw matrices of -1, 0 and 1, two thirds of them 0.", default=False)
    very_sparse: bool = option("Draw such matrices with still more zeros.", default=False)
    randlora_dropout: float = option("Of the inputs, in training.", default=0.0)
    init_weights: bool = option(_IDENTITY, default=True)

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"randlora_lambda": normal(1.0)}
