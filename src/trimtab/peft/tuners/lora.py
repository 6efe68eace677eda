"""LoRA's configuration, model and layers, where users look for them."""

from __future__ import annotations

from trimtab.adapt.site import SiteBase
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.tuner import Tuner as LoraModel

_FACTORS = ("lora_A", "lora_embedding_A")


class _Layers(type):
    def __instancecheck__(cls, module: object) -> bool:
        return isinstance(module, SiteBase) and any(name in module._modules for name in _FACTORS)


class LoraLayer(metaclass=_Layers):
    """What ``isinstance`` finds every layer with a LoRA to be. It has no instances of its own."""


__all__ = ["LoraConfig", "LoraLayer", "LoraModel"]
