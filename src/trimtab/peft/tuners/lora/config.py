"""``peft.tuners.lora.config``."""

from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.configs.lora_parts import (
    ArrowConfig,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
)

__all__ = [
    "ArrowConfig",
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
]
