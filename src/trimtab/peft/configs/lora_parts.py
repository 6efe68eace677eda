"""What `LoraConfig` holds for some initialisations and for the process."""

from __future__ import annotations

from typing import Literal

from trimtab.errors import ConfigError
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
class LoftQConfig:
    """Of LoftQ, which builds a quantised base; Trimtab has none, so that only its defaults can be read."""

    loftq_bits: int = option("Bits of the base's weights.", default=4)
    loftq_iter: int = option("How often base and factors are fitted in turn.", default=1)


@config()
class LoraRuntimeConfig:
    """Settings of the process, which no file holds."""

    ephemeral_gpu_offload: bool = option("Not needed here, and refused.", default=False)
