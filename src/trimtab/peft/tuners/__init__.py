"""PEFT's import paths below ``peft.tuners``: configurations, tuners and layer classes.

Every tuner is a `trimtab.peft.tuner.Tuner`; the classes of the methods are in `trimtab.peft.kinds`.
"""

from __future__ import annotations

from typing import Any

from trimtab.peft import kinds, layers


def __getattr__(name: str) -> Any:
    import trimtab.peft as face

    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Model") and f"{name.removesuffix('Model')}Config" in face.__all__:
        return getattr(kinds, name)
    if name in vars(layers):
        return getattr(layers, name)
    return getattr(face, name)
