"""Our classes are subclasses of PEFT's where it is installed, and yet nothing of PEFT's runs."""

from __future__ import annotations

import peft
import pytest

import trimtab.peft as ours
from trimtab.peft.config import CONFIGS
from trimtab.peft.configs import ours as own_methods  # the first import makes all of them known

assert own_methods is not None
CLASSES = [
    name for name in ours.__all__ if name.startswith(("Peft", "Auto")) or name.endswith("Config")
]
SHARED = [name for name in CLASSES if isinstance(getattr(peft, name, None), type)]


@pytest.mark.parametrize("name", SHARED)
def test_every_public_name_of_pefts_class_is_our_own(name: str) -> None:
    mine, theirs = getattr(ours, name), getattr(peft, name)
    if not issubclass(mine, theirs):  # no library asks for it: nothing can be inherited
        return
    inherited = [
        attribute
        for attribute in dir(theirs)
        if not attribute.startswith("_")
        and next(c for c in mine.__mro__ if attribute in vars(c)).__module__.startswith("peft.")
    ]
    assert inherited == []


@pytest.mark.parametrize(
    "name", ["PeftModel", "PeftMixedModel", "PeftConfig", "LoraConfig", "PeftModelForCausalLM"]
)
def test_libraries_that_ask_for_pefts_classes_take_ours(name: str) -> None:
    assert issubclass(getattr(ours, name), getattr(peft, name))


@pytest.mark.parametrize("peft_type", CONFIGS)
def test_no_configuration_asks_pefts_models_for_a_prompt_encoder(peft_type: str) -> None:
    """Prompts are adapters of our tuner like others, in PEFT's models too."""
    assert CONFIGS[peft_type].is_prompt_learning is False
    assert CONFIGS[peft_type].is_adaption_prompt is False
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft_type].__module__ == "trimtab.peft.guest"


def test_pefts_own_types_are_as_they_were() -> None:
    """And ours are not in the table by which it reads folders."""
    assert "TRIMTAB_LORA" not in peft.PEFT_TYPE_TO_CONFIG_MAPPING
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is peft.LoraModel
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is peft.LoraConfig
