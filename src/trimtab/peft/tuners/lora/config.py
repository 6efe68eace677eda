"""``peft.tuners.lora.config``."""

from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.configs.lora_parts import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
)

__all__ = [
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
]
