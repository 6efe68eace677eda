"""Import paths below ``peft.tuners``, and asking with ``isinstance`` what a layer is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import CASES
from trimtab.peft import LoraConfig, get_peft_model
from trimtab.peft.layers import IA3Layer, LoraLayer
from trimtab.peft.tuners import LoraModel
from trimtab.peft.tuners.lora import Embedding, Linear
from trimtab.peft.tuners.lora.layer import LoraLayer as ByPath
from trimtab.peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer


def test_the_usual_loop_over_layers_finds_what_is_adapted() -> None:
    """As QLoRA's script walks a model to choose dtypes."""
    targets = ["q_proj", "embed_tokens"]
    model = get_peft_model(CASES["llama"].make(), LoraConfig(target_modules=targets))
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert found == {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert {name.rpartition(".")[2] for name in found} == set(targets)
    assert ByPath is LoraLayer
    inner = model.base_model.model.model
    assert isinstance(inner.embed_tokens, Embedding)
    assert isinstance(inner.layers[0].self_attn.q_proj, Linear)
    assert not isinstance(inner.embed_tokens, Linear)
    assert not any(isinstance(module, IA3Layer) for module in model.modules())
    assert isinstance(model.base_model, LoraModel)
    assert isinstance(model.base_model, BaseTuner)
    with pytest.raises(TypeError, match="only asked for with isinstance"):
        LoraLayer(nn.Linear(2, 2))


def test_a_layer_answers_in_pefts_words() -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    model = get_peft_model(CASES["llama"].make(), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r == {"default": 4}
    assert layer.lora_alpha == {"default": 8}
    assert layer.scaling == {"default": 2.0}
    assert layer.active_adapters == ["default"]
    assert layer.active_adapter == "default"
    assert (layer.in_features, layer.out_features) == (32, 32)
    assert isinstance(layer.get_base_layer(), nn.Linear)
    assert layer.lora_A["default"].weight is layer.lora_A.default.weight
    assert "default" in layer.lora_A
    assert list(layer.lora_A.keys()) == ["default"]
    assert not layer.merged
    frozen = layer.base_layer.weight.clone()
    model.merge_adapter()
    assert layer.merged_adapters == ["default"]
    with torch.no_grad():
        layer.lora_B.default.weight.fill_(0.1)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, frozen)
    with model.disable_adapter():
        assert not layer.disable_adapters  # a scope, not a switch
    model.base_model.disable_adapter_layers()
    assert layer.disable_adapters
