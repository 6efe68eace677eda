"""Status of layers and models: equal to PEFT's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab as tt
import trimtab.peft as face
from tests import tiny
from tests.peft.kit import both, made
from trimtab.errors import AttachError

PLAIN: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
OTHER: dict[str, Any] = {"r": 2, "target_modules": ["v_proj", "down_proj"]}


def assert_same(theirs: Any, ours: Any) -> None:
    assert [asdict(s) for s in ours.get_layer_status()] == [
        asdict(s) for s in theirs.get_layer_status()
    ]
    assert asdict(ours.get_model_status()) == asdict(theirs.get_model_status())
    assert asdict(face.get_model_status(ours)) == asdict(peft.get_model_status(theirs))


def test_one_adapter() -> None:
    assert_same(*both({"default": PLAIN}))


def test_two_adapters_at_different_layers() -> None:
    theirs, ours = both({"default": PLAIN, "other": OTHER})
    assert_same(theirs, ours)
    for model in (theirs, ours):
        model.set_adapter("other")
    assert_same(theirs, ours)


def test_disabled() -> None:
    theirs, ours = both({"default": PLAIN, "other": OTHER})
    for model in (theirs, ours):
        model.base_model.disable_adapter_layers()
    pairs = zip(theirs.get_layer_status(), ours.get_layer_status(), strict=True)
    for other, own in pairs:
        # who acts does not decide here who is trained; PEFT freezes what it disables
        assert asdict(own) == {**asdict(other), "requires_grad": own.requires_grad}
    assert ours.get_model_status().enabled is False
    for model in (theirs, ours):
        model.base_model.enable_adapter_layers()
    assert_same(theirs, ours)


def test_merged() -> None:
    theirs, ours = both({"default": PLAIN})
    for model in (theirs, ours):
        model.merge_adapter()
    assert_same(theirs, ours)
    assert ours.get_model_status().merged_adapters == ["default"]


def test_merged_where_layers_differ() -> None:
    """Some layers of the merged adapter hold another one, which is not merged."""
    theirs, ours = both({"default": PLAIN, "other": OTHER})
    for model in (theirs, ours):
        model.merge_adapter()
    assert_same(theirs, ours)


def test_irregular_gradients() -> None:
    theirs, ours = both({"default": PLAIN})
    for model in (theirs, ours):
        layer = model.base_model.model.model.layers[0].self_attn
        layer.q_proj.lora_A["default"].weight.requires_grad_(False)
        for parameter in layer.v_proj.lora_B["default"].parameters():
            parameter.requires_grad_(False)
        for parameter in layer.v_proj.lora_A["default"].parameters():
            parameter.requires_grad_(False)
    assert_same(theirs, ours)
    assert ours.get_layer_status()[0].requires_grad == {"default": "irregular"}
    assert ours.get_layer_status()[1].requires_grad == {"default": False}


@pytest.mark.parametrize("option", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_options_of_lora(option: dict[str, Any]) -> None:
    assert_same(*both({"default": {**PLAIN, **option}}))


def test_gpt2() -> None:
    config = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    assert_same(*both({"default": config}, base=tiny.gpt2))


def test_a_head_that_is_trained_in_full() -> None:
    config = {**PLAIN, "modules_to_save": ["score"]}
    theirs, ours = both({"default": config}, base=tiny.llama_classifier)
    assert_same(theirs, ours)
    for model in (theirs, ours):
        model.merge_adapter()
    # here the head is merged as the layers are; PEFT leaves it out, and calls the model irregular
    assert theirs.get_model_status().merged_adapters == "irregular"
    assert ours.get_model_status().merged_adapters == ["default"]


@pytest.mark.skipif("IA3Config" not in face.__all__, reason="its configuration is not there yet")
def test_ia3() -> None:
    config = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    assert_same(*both({"default": config}, kind="IA3Config"))


def test_a_model_that_is_no_peft_model() -> None:
    model, other = tiny.llama(num_hidden_layers=1), tiny.llama(num_hidden_layers=1)
    face.inject_adapter_in_model(face.LoraConfig(**PLAIN), model)
    peft.inject_adapter_in_model(peft.LoraConfig(**PLAIN), other)
    assert [asdict(s) for s in face.get_layer_status(model)] == [
        asdict(s) for s in peft.get_layer_status(other)
    ]
    ours, theirs = asdict(face.get_model_status(model)), asdict(peft.get_model_status(other))
    assert ours == theirs


def test_what_peft_has_no_name_for() -> None:
    model = tiny.mixtral()
    tt.attach(model, "bottleneck(size=4)", "a")
    tt.attach(model, "lora(rank=2, targets=['gate_up_proj', 'down_proj'])", "b")
    layers = face.get_layer_status(model)
    assert {layer.module_type for layer in layers} == {
        "bottleneck.Linear", "bottleneck.MixtralSparseMoeBlock", "lora.MixtralExperts",
    }  # fmt: skip
    experts = [layer.name for layer in layers if layer.available_adapters == ["b"]]
    assert all(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in experts)
    assert len(experts) == 4


def test_a_model_without_adapters() -> None:
    with pytest.raises(AttachError, match="no layers"):
        face.get_layer_status(tiny.llama(num_hidden_layers=1))


def test_a_compiled_model() -> None:
    model = made(face, {"default": PLAIN})
    expected = model.get_layer_status()
    assert face.get_layer_status(torch.compile(model, backend="eager")) == expected


def test_loaded_for_inference(tmp_path: Path) -> None:
    model = made(face, {"default": PLAIN})
    model.save_pretrained(tmp_path)
    loaded = face.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path)
    assert loaded.get_model_status().requires_grad == {"default": False}
    assert loaded.get_model_status().trainable_params == 0
