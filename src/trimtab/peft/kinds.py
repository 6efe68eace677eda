"""A class of tuners for each method, by PEFT's names: `LoraModel`, `IA3Model`, …

All are `trimtab.peft.tuner.Tuner`. The class says which method a tuner began with, so that the usual question,
``isinstance(model.base_model, LoraModel)``, has its usual answer; adapters of other methods may stand beside it. As in
PEFT, one can be made directly: ``LoraModel(model, config, "default")`` puts an adapter into a model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from trimtab.peft.config import CONFIGS
from trimtab.peft.kin import register
from trimtab.peft.tuner import Tuner


@cache
def tuner_class(peft_type: str) -> type[Tuner]:
    """The class of the tuners of a method; a subclass of another's where the configuration is one (AdaLoRA's)."""
    config = CONFIGS[peft_type]
    others = (cls.__dict__.get("peft_type") for cls in config.__mro__)
    parent = next((other for other in others if other in CONFIGS and other != peft_type), None)
    name = f"{config.__name__.removesuffix('Config')}Model"
    facts = {
        "__module__": __name__,
        "__doc__": f"A model with adapters that began with a `{config.__name__}`.",
        "prefix": config.prefix,
        "peft_type": peft_type,
    }
    made = type(name, (tuner_class(parent) if parent else Tuner,), facts)
    register(made, name)
    return made


def __getattr__(name: str) -> Any:
    if not name.endswith("Model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trimtab.peft.configs import ours as ours  # the first import makes all of them known

    for peft_type, config in CONFIGS.items():
        if name == f"{config.__name__.removesuffix('Config')}Model":
            return tuner_class(peft_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
