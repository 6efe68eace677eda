"""A class of tuners for each method: what it is an instance of, and that it can be made directly, as PEFT's can."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch

import trimtab.peft as ours
from tests import tiny
from tests.peft.test_counts import LAYERWISE
from trimtab.errors import ConfigError
from trimtab.peft.tuner import Tuner

FIRST = dict(reversed(LAYERWISE))
"""One configuration of each class."""
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("name", FIRST)
def test_base_model_is_of_the_methods_own_class(name: str) -> None:
    config = getattr(ours, name)(**FIRST[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ours.get_peft_model(tiny.llama(), config)
    tuner = model.base_model
    kind = name.replace("Config", "Model")
    assert type(tuner) is getattr(ours, kind) and isinstance(tuner, Tuner)
    assert isinstance(tuner, getattr(peft, kind)), "libraries ask for PEFT's class"
    assert tuner.prefix == getattr(peft, kind).prefix
    others = [n.replace("Config", "Model") for n in FIRST if n != name]
    taken = {other for other in others if isinstance(tuner, getattr(ours, other))}
    assert taken == ({"LoraModel"} if name == "AdaLoraConfig" else set())
    assert ours.PEFT_TYPE_TO_TUNER_MAPPING[ours.PeftType(config.peft_type)] is type(tuner)


@pytest.mark.parametrize(
    "name", ["LoraConfig", "IA3Config", "OFTConfig", "VeraConfig", "AdaLoraConfig"]
)
def test_made_directly_it_is_the_model_that_peft_makes(name: str) -> None:
    kind = name.replace("Config", "Model")
    made: list[Any] = []
    for package in (ours, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(package, name)(**FIRST[name], target_modules=["q_proj", "v_proj"],
                                            **({"feedforward_modules": []} if name == "IA3Config" else {}))  # fmt: skip
            made.append(getattr(package, kind)(tiny.llama(), config, "default"))
    mine, theirs = made
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in made]
    assert trained[0] == trained[1]
    drawn = ("ranknum", "vera_A", "vera_B")  # frozen, of one value, or drawn from a seed
    kept = {key for key in theirs.state_dict() if not any(part in key for part in drawn)}
    assert kept == set(mine.state_dict())
    with torch.no_grad():
        found = mine(input_ids=IDS).logits
        for parameter in mine.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        assert not torch.allclose(mine(input_ids=IDS).logits, found)
        edited = mine(input_ids=IDS).logits
        merged = mine.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, edited, atol=1e-4)
    assert type(merged).__name__ == "LlamaForCausalLM"


def test_further_adapters_are_put_into_the_same_model() -> None:
    model = tiny.llama()
    ours.LoraModel(model, ours.LoraConfig(target_modules=["q_proj"]), "default")
    tuner = ours.LoraModel(model, ours.LoraConfig(target_modules=["v_proj"], r=2), "other")
    assert list(tuner.adapters) == ["default", "other"] == list(model.peft_config)


def test_a_configuration_of_another_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="LoraModel does not begin with a IA3Config"):
        ours.LoraModel(tiny.llama(), ours.IA3Config(), "default")


def test_methods_that_peft_lacks_have_classes_too() -> None:
    from trimtab.peft.tuners import BottleneckModel

    model = ours.get_peft_model(tiny.llama(), ours.BottleneckConfig())
    assert type(model.base_model) is BottleneckModel
