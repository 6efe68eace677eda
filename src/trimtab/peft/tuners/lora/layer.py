"""``peft.tuners.lora.layer``."""

from trimtab.peft.tuners.lora import Conv2d, Embedding, Linear, LoraLayer

__all__ = ["Conv2d", "Embedding", "Linear", "LoraLayer"]
