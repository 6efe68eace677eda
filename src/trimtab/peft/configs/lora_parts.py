"""What `LoraConfig` holds for some initialisations and for the process."""

from __future__ import annotations

from typing import Any, Literal

from trimtab.errors import ConfigError, suggest
from trimtab.peft.config import config, option


@config()
class EvaConfig:
    """Of ``init_lora_weights="eva"``: A begins as the principal directions of each layer's inputs."""

    rho: float = option("No layer gets more than rho times the rank.", default=2.0)
    tau: float = option("How alike directions must be from batch to batch.", default=0.99)
    use_label_mask: bool = option("Whether positions without a label are left out.", default=True)
    label_mask_value: int = option("The label of such positions.", default=-100)
    whiten: bool = option("Whether directions are whitened.", default=False)
    adjust_scaling_factors: bool = option(
        "Whether each layer keeps its scale at its new rank.", default=True
    )

    def __post_init__(self) -> None:
        fixed = (
            self.use_label_mask,
            self.label_mask_value,
            self.whiten,
            self.adjust_scaling_factors,
        )
        if fixed != (True, -100, False, True):
            raise ConfigError(
                "EvaConfig: Trimtab's EVA leaves out positions whose label is -100, does not whiten, and keeps scales; "
                "these options must stay at their defaults."
            )

    @property
    def init(self) -> str:
        """Our initialisation."""
        return f"eva(rho={float(self.rho)}, tau={float(self.tau)})"


@config()
class LoraGAConfig:
    """Of ``init_lora_weights="lora_ga"``: the factors begin as those of the first gradient."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = option(
        "Which singular vectors A and B take.", default="ArB2r"
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = option(
        "How they are scaled.", default="stable"
    )
    stable_gamma: int = option("The larger, the smaller they are.", default=16)

    def __post_init__(self) -> None:
        if self.direction == "random" or self.scale != "stable":
            raise ConfigError(
                f"LoraGAConfig: direction={self.direction!r}, scale={self.scale!r}: Trimtab has the directions ArB2r, "
                "A2rBr and ArBr, and the scale 'stable'."
            )

    @property
    def init(self) -> str:
        """Our initialisation, at PEFT's scale."""
        return (
            f"lora-ga(gamma={float(self.stable_gamma)}, direction='{self.direction}', scale='peft')"
        )


@config()
class KasaConfig:
    """Of KaSA: the weights of its loss, which `LoraModel._get_kasa_loss` gives."""

    beta: float = option("Weight of the squares of the singular values.", default=1e-4)
    gamma: float = option("Weight of how far the factors are from orthogonal.", default=1e-3)

    def __post_init__(self) -> None:
        _at_least_zero(self, "beta", "gamma")


@config()
class BdLoraConfig:
    """Of BD-LoRA: which of the two factors is block-diagonal in which layers."""

    target_modules_bd_a: list[str] | None = option(
        "Layers whose own names contain one of these have blocks in A.", default=None
    )
    target_modules_bd_b: list[str] | None = option("The same for B.", default=None)
    nblocks: int = option("How many blocks there are.", default=1)
    match_strict: bool = option("Whether a layer that has neither is refused.", default=True)

    def __post_init__(self) -> None:
        _above_zero(self, "nblocks")
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ConfigError(
                f"BdLoraConfig: {sorted(both)[0]!r} is in target_modules_bd_a and in target_modules_bd_b; one of the "
                "factors can have blocks."
            )


@config()
class VeloraConfig:
    """Of VeLoRA: what is kept of the inputs for backward."""

    num_groups: int = option("Numbers that are kept of each position.", default=64)
    scale: float = option("Of the input that backward takes.", default=1.0)
    init_type: Literal["batch_average", "batch_average_once", "random"] = option(
        "The direction of each batch, of the first one, or a drawn one.", default="batch_average"
    )

    def __post_init__(self) -> None:
        _above_zero(self, "num_groups", "scale")
        known = ("batch_average", "batch_average_once", "random")
        if self.init_type not in known:
            raise ConfigError(
                f"VeloraConfig: init_type must be one of {', '.join(known)}, not {self.init_type!r}."
                f"{suggest(str(self.init_type), known)}"
            )


@config()
class MontecloraConfig:
    """Of MonteCLoRA: the draws around A in training, and the loss that `LoraModel._get_monteclora_loss` gives."""

    num_samples: int = option("Draws in each forward.", default=8)
    use_entropy: bool = option(
        "Whether the weights of draws have a loss of their own.", default=False
    )
    dirichlet_prior: float = option("Prior concentration of those weights.", default=0.1)
    sample_scaler: float = option("How far draws stray.", default=1e-4)
    kl_loss_weight: float = option("Weight of the divergences from the priors.", default=1e-5)
    buffer_size: int = option("No effect: nothing is drawn in advance.", default=150)

    def __post_init__(self) -> None:
        _above_zero(self, "num_samples", "dirichlet_prior", "buffer_size")


@config()
class ArrowConfig:
    """Of an Arrow router, at which each token chooses among LoRAs (`trimtab.methods.arrow`)."""

    top_k: int = option("How many LoRAs act on a token.", default=3)
    router_temperature: float = option("The higher, the more alike their shares.", default=1.0)
    use_gks: bool = option(
        "Whether what general LoRAs share is taken out of each (GenKnowSub).", default=False
    )
    task_adapter_names: list[str] | None = option(
        "The LoRAs; `create_arrow_model` says it.", default=None
    )
    gks_adapter_names: list[str] | None = option(
        "The general LoRAs; `create_arrow_model` says it.", default=None
    )
    rng_seed: int | None = option(
        "Of the vector that prototypes are found from; None is 0, and not by chance.", default=None
    )

    def __post_init__(self) -> None:
        if self.top_k < 1 or not self.router_temperature > 0:
            raise ConfigError(
                f"ArrowConfig: top_k and router_temperature must be above 0, not {self.top_k!r} and "
                f"{self.router_temperature!r}."
            )


@config()
class CordaConfig:
    """Of ``init_lora_weights="corda"``: the factors begin as parts of the weight, seen by each layer's inputs."""

    cache_file: str | None = option("Refused by preprocess_corda: it is a pickle.", default=None)
    covariance_file: str | None = option(
        "Refused by preprocess_corda: it is a pickle.", default=None
    )
    corda_method: Literal["ipm", "kpm"] = option(
        "Whether what the data use most is trained (ipm), or what they use least (kpm).",
        default="ipm",
    )
    verbose: bool = option("No effect.", default=False)
    use_float16_for_covariance: bool = option("No effect: it is fp32.", default=False)
    prune_temporary_fields: bool = option("No effect: nothing is put into layers.", default=True)

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ConfigError(
                f"CordaConfig: corda_method is ipm or kpm, not {self.corda_method!r}."
            )

    @property
    def init(self) -> str:
        """Our initialisation."""
        return f"corda(mode='{self.corda_method}')"


@config()
class LoftQConfig:
    """Of ``init_lora_weights="loftq"``: the factors begin as what rounding the base lost."""

    loftq_bits: int = option("Bits of the base's weights: 4 (NF4) or 8.", default=4)
    loftq_iter: int = option("How often base and factors are fitted in turn.", default=1)

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8) or self.loftq_iter < 1:
            raise ConfigError(
                f"LoftQConfig: loftq_bits is 4 or 8, and loftq_iter 1 or more, not {self.loftq_bits!r} and "
                f"{self.loftq_iter!r}."
            )


@config()
class LoraRuntimeConfig:
    """Settings of the process, which no file holds."""

    ephemeral_gpu_offload: bool = option("Not needed here, and refused.", default=False)


def _above_zero(part: Any, *names: str) -> None:
    for name in names:
        if not getattr(part, name) > 0:
            raise ConfigError(
                f"{type(part).__name__}: {name} must be above 0, not {getattr(part, name)!r}."
            )


def _at_least_zero(part: Any, *names: str) -> None:
    for name in names:
        if not getattr(part, name) >= 0:
            raise ConfigError(
                f"{type(part).__name__}: {name} must not be below 0, as {getattr(part, name)!r} is."
            )
