"""Where users look for the tables of methods and the functions that begin with a configuration."""

from collections.abc import Mapping

from trimtab.peft.config import CONFIGS, PeftConfig, get_peft_config
from trimtab.peft.configs import ours as ours
from trimtab.peft.kinds import tuner_class
from trimtab.peft.task_models import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    get_peft_model,
    inject_adapter_in_model,
)
from trimtab.peft.tuner import Tuner
from trimtab.peft.types import PeftType

PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[PeftType, type[PeftConfig]] = {
    PeftType(name): cls for name, cls in CONFIGS.items()
}
"""The class of each method's configurations."""
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[PeftType, type[Tuner]] = {
    PeftType(name): tuner_class(name) for name in CONFIGS
}
"""The class of the tuners that begin with each method."""

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]
