"""Finding the parts of the face inside a model, however it is wrapped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trimtab.adapt.bank import CHILD, Bank
from trimtab.peft.config import PeftConfig
from trimtab.peft.delegates import Delegates
from trimtab.peft.tuner import Tuner


def tuner_of(model: nn.Module) -> Tuner | None:
    """The tuner in a model; None where adapters were put into the model itself."""
    for module in model.modules():
        if isinstance(module, Delegates):
            return module.tuner
        if isinstance(module, Tuner):
            return module
    return None


def configs_of(model: nn.Module) -> Mapping[str, PeftConfig]:
    """The configurations of a model's adapters, as far as there are any."""
    tuner = tuner_of(model)
    return {} if tuner is None else tuner.peft_config


def root_of(model: nn.Module) -> nn.Module:
    """The module that adapters were attached to; the model itself, where there are none."""
    return next((m for m in model.modules() if isinstance(m._modules.get(CHILD), Bank)), model)
