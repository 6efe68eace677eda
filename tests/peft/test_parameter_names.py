"""Names of parameters, of state dicts and of modules where wrappers lie in each other: PEFT's, and what they reach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import trimtab as tt
import trimtab.peft as ours
from tests import tiny
from tests.oracles import kit
from tests.peft.test_counts import both

Make = Callable[[], nn.Module]
ROWS: list[tuple[str, Make, str, dict[str, Any]]] = [
    ("rows", tiny.llama, "LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    ("tied rows", tiny.gpt2, "LoraConfig", {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]}),
    ("rows of two", tiny.llama, "LoraConfig",
     {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1]}}),
    ("rows alone", tiny.llama, "TrainableTokensConfig", {"token_indices": [1, 2]}),
    ("tied rows alone", tiny.gpt2, "TrainableTokensConfig", {"token_indices": [1, 2], "target_modules": ["wte"]}),
]  # fmt: skip
HEADS: list[tuple[str, Make, str, dict[str, Any]]] = [
    ("head", kit.roberta, "LoraConfig", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("pooler", tiny.bert, "LoraConfig", {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}),
    ("block", tiny.llama, "LoraConfig", {"target_modules": ["lm_head"], "modules_to_save": ["layers.0", "model.norm"]}),
    ("mlp", tiny.llama, "IA3Config",
     {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["layers.1.mlp"]}),
    ("mlps", tiny.llama, "LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
]  # fmt: skip
CASES = [*ROWS, *HEADS]


@pytest.fixture(params=CASES, ids=[case[0] for case in CASES])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    _, make, config, options = request.param
    mine, theirs = both(config, make, **copy.deepcopy(options))
    return mine.eval(), theirs.eval()


def test_names_are_pefts(pair: tuple[Any, Any]) -> None:
    mine, theirs = pair
    for learns in (True, False):
        named = [
            [n for n, p in model.named_parameters() if p.requires_grad or not learns]
            for model in pair
        ]
        assert sorted(named[0]) == sorted(named[1])
    assert set(mine.state_dict()) == set(theirs.state_dict())
    for name in [n for n, m in theirs.named_modules() if list(m.parameters()) and n]:
        assert isinstance(mine.get_submodule(name), nn.Module)
    for name, parameter in mine.named_parameters():
        assert mine.get_parameter(name) is parameter


def test_a_state_dict_of_pefts_is_ours(pair: tuple[Any, Any]) -> None:
    mine, theirs = pair
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        mine.load_state_dict(theirs.state_dict())
        batch = kit.batch_of(mine.get_base_model())
        kit.assert_close(kit.outputs(mine, batch), kit.outputs(theirs, batch), "outputs")
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
        with kit.quiet("Setting `save_embedding", "Could not identify"):
            state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        copies = {
            k for k in state if "lm_head" in k and k not in ours.get_peft_model_state_dict(mine)
        }
        for key, value in ours.get_peft_model_state_dict(mine).items():
            assert torch.equal(state.pop(key), value)
        assert set(state) == copies
        from_state = ours.get_peft_model_state_dict(mine, mine.state_dict())
        assert from_state.keys() == ours.get_peft_model_state_dict(mine).keys()
        inner = mine.get_base_model().state_dict()
        assert ours.get_peft_model_state_dict(mine, inner).keys() == from_state.keys()


def test_the_base_is_as_it_was(pair: tuple[Any, Any]) -> None:
    mine, _ = pair
    bare = ours.get_base_model_state_dict(mine)
    batch = kit.batch_of(mine.get_base_model())
    acting = kit.outputs(mine, batch)
    with torch.no_grad():
        merged = copy.deepcopy(mine).merge_and_unload()
        kit.assert_close(kit.outputs(merged, batch), acting, "merged")
    model = mine.unload()
    assert model.state_dict().keys() == bare.keys() == merged.state_dict().keys()
    assert all(torch.equal(value, bare[key]) for key, value in model.state_dict().items())
    assert not any("trimtab" in type(module).__module__ for module in model.modules())


def test_rows_of_a_tied_embedding_are_the_head_s_too(tmp_path: Any) -> None:
    """As in PEFT, without being asked; and so they are read from either's folder."""
    options = {"token_indices": [1, 2], "target_modules": ["wte"]}
    mine, theirs = both("TrainableTokensConfig", tiny.gpt2, **options)
    for model in (mine.eval(), theirs.eval()):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    batch = kit.batch_of(mine.get_base_model())
    with (
        torch.no_grad(),
        kit.quiet("Setting `save_embedding", "Could not identify", "Found missing"),
    ):
        expected = kit.outputs(theirs, batch)
        kit.assert_close(kit.outputs(mine, batch), expected, "ours")
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        mine.save_pretrained(tmp_path / "ours")
        (tmp_path / "ours" / "trimtab.json").unlink()
        for folder in (tmp_path / "theirs", tmp_path / "ours"):
            there = peft.PeftModel.from_pretrained(tiny.gpt2(), folder).eval()
            kit.assert_close(kit.outputs(there, batch), expected, "PEFT")
            adapter = tt.Adapter.load(folder)
            assert [name.path for name in adapter.named()] == ["transformer.wte"]
            here = ours.PeftModel.from_pretrained(tiny.gpt2(), folder).eval()
            kit.assert_close(kit.outputs(here, batch), expected, "the face")


def test_a_module_of_several_layers_is_shown_as_it_was_and_as_each_adapter_has_it() -> None:
    config = ours.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = ours.get_peft_model(kit.roberta(), config)
    model.add_adapter("b", config)
    model.add_adapter("inside", ours.LoraConfig(target_modules=["dense"], init_lora_weights=False))
    head = model.eval().get_base_model().classifier
    adapters = model.base_model.adapters
    for name in ("default", "b"):
        kit.stir(adapters[name], seed=len(name))
    x = torch.randn(2, 4, head.dense.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(head.original_module(x), head(x))
        for name in ("default", "b"):
            model.set_adapter(name)
            assert torch.equal(head.modules_to_save[name](x), head(x))
            assert not torch.allclose(head.original_module(x), head(x))
            assert head.active_adapters == [name]
            own = head.modules_to_save[name].dense.weight
            assert own is adapters[name].at_site("classifier.dense")["modules_to_save.weight"]
        model.set_adapter("inside")
        assert head.active_adapters == []
        assert not torch.allclose(head(x), head.original_module(x))
    assert "base_model.model.classifier.dense.lora_A.inside.weight" in model.state_dict()
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.delete_adapter("default")
    assert list(head.modules_to_save.keys()) == ["b"]
    assert "base_model.model.classifier.modules_to_save.b.dense.weight" in model.state_dict()
    model.delete_adapter("b")
    assert type(model.get_base_model().classifier).__name__ == "RobertaClassificationHead"
    assert not any("modules_to_save" in name for name in model.state_dict())
