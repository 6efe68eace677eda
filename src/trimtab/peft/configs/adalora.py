"""`AdaLoraConfig`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from trimtab.adapt.contract import Init, Method, normal
from trimtab.adapt.lowrank_in_peft import VARIANTS
from trimtab.errors import ConfigError
from trimtab.peft.config import config, option
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.types import PeftType

_NO = "AdaLoRA begins in its own way."


@config(PeftType.ADALORA)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: ranks are shared out among the sites while it is trained.

    Call ``model.base_model.update_and_allocate(step)`` after each step of the optimizer, before gradients are cleared.
    """

    sizes: ClassVar[tuple[str, ...]] = ("init_r", "target_r", "deltaT")
    lacks: ClassVar[dict[str, str]] = {
        **LoraConfig.lacks,
        **dict.fromkeys(VARIANTS, "AdaLoRA is another method."),
        "use_dora": "AdaLoRA has no magnitudes.",
        "lora_bias": "Use bias='lora_only', which trains the layers' own biases.",
        "eva_config": _NO,
        "lora_ga_config": _NO,
        "corda_config": _NO,
        "layer_replication": "LoraConfig has it.",
        "arrow_config": "Its adapters are no plain LoRAs.",
        "ensure_weight_tying": "Name both ends of tied weights, and each is trained apart.",
        "loftq_config": _NO,
        "alora_invocation_tokens": "LoraConfig has it.",
        "target_parameters": "AdaLoRA acts on layers.",
    }

    target_r: int = option("Components left in the end, per site on average.", default=8)
    init_r: int = option("Components of each site at first.", default=12)
    tinit: int = option("Steps before the first cut.", default=0)
    tfinal: int = option("Steps after the last cut.", default=0)
    deltaT: int = option("Steps from one cut to the next.", default=1)
    beta1: float = option("Decay of the mean of the importance.", default=0.85)
    beta2: float = option("Decay of how far it strays from that mean.", default=0.85)
    orth_reg_weight: float = option("Weight of the loss that keeps components apart.", default=0.5)
    total_step: int | None = option("How many steps there will be.", default=None)
    rank_pattern: dict[str, Any] | None = option(
        "What is left of each site, in a file.", default=None
    )

    def check(self) -> None:
        super().check()
        total = self.total_step
        if not total or total < 1:
            raise ConfigError(
                "AdaLoraConfig: total_step, the number of steps of training, is needed for the schedule of ranks."
            )
        if self.tinit < 0 or self.tfinal < 0 or self.tinit >= total - self.tfinal:
            raise ConfigError(
                f"AdaLoraConfig: tinit={self.tinit} and tfinal={self.tfinal} leave none of {total} steps to share out "
                "ranks; lower them, or raise total_step."
            )
        if self.target_r > self.init_r:
            raise ConfigError(
                f"AdaLoraConfig: target_r={self.target_r} is left of init_r={self.init_r}, so it cannot be more."
            )
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"AdaLoraConfig: init_lora_weights={self.init_lora_weights!r}: AdaLoRA begins in its own way; give "
                "True or False."
            )
        if self.orth_reg_weight < 0:
            raise ConfigError("AdaLoraConfig: orth_reg_weight must not be below 0.")
        for name, default in (("r", 8), ("use_rslora", False), ("alpha_pattern", {})):
            if getattr(self, name) not in (default, None):
                advice = "; the first rank is init_r" if name == "r" else ""
                warnings.warn(
                    f"AdaLoraConfig: {name} has no effect in AdaLoRA{advice}.", stacklevel=2
                )

    def begun(self, method: Method, model: nn.Module) -> Method:
        return self._with_tokens(method, model)

    def first_values(self) -> Mapping[str, Init]:
        if self.init_lora_weights is not False:
            return {}
        return dict.fromkeys(("lora_A", "lora_B", "lora_E"), normal(1.0))
