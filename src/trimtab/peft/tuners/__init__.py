"""Where users look for configurations and layers: ``from trimtab.peft.tuners.lora import LoraLayer``."""

from __future__ import annotations

from typing import Any

import trimtab.peft as face
from trimtab.peft.tuners.lora import LoraLayer as LoraLayer
from trimtab.peft.tuners.lora import LoraModel as LoraModel


def __getattr__(name: str) -> Any:
    if name.endswith("Config") or name.startswith("Prompt"):
        return getattr(face, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
