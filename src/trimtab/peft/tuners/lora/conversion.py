"""``peft.tuners.lora.conversion``."""

from trimtab.peft.conversion import convert_to_lora, save_as_lora

__all__ = ["convert_to_lora", "save_as_lora"]
