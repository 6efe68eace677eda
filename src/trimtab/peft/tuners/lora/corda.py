"""``peft.tuners.lora.corda``."""

from trimtab.peft.informed import preprocess_corda

__all__ = ["preprocess_corda"]
