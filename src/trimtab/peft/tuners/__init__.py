"""PEFT's import paths below ``peft.tuners``: configurations, tuners and layer classes.

Every tuner is `trimtab.peft.tuner.Tuner`, whatever the method; PEFT has a class for each.
"""

from __future__ import annotations

from typing import Any

from trimtab.peft import layers
from trimtab.peft.tuner import Tuner


def __getattr__(name: str) -> Any:
    import trimtab.peft as face

    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Model") and f"{name.removesuffix('Model')}Config" in face.__all__:
        return Tuner
    if name in vars(layers):
        return getattr(layers, name)
    return getattr(face, name)
