"""What passes silently in PEFT 0.21.2, through its own names here: an error, or right. The numbers are those of
``docs/from-peft.md``."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trimtab.errors as errors
import trimtab.peft as peft
from tests import tiny
from tests.peft import script_kit as kit
from trimtab.errors import (
    AttachError,
    BaseMismatchError,
    DuplicateNameError,
    TargetError,
    UnknownNameError,
)

PAGE = Path(__file__).parents[2] / "docs" / "from-peft.md"
TARGETS = ["q_proj", "v_proj"]


def base(**changes: Any) -> nn.Module:
    return kit.loud(tiny.llama(**changes))  # type: ignore[no-any-return]


def made(**options: Any) -> Any:
    """A model with one LoRA that acts."""
    model = peft.get_peft_model(
        base(), peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})
    )
    kit.filled(model)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, **more: Any) -> Tensor:
    return model(input_ids=kit.ids(), **more).logits  # type: ignore[no-any-return]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def test_s1_a_target_that_matches_nothing() -> None:
    with pytest.raises(TargetError, match="'v_prj' matches no module.*Did you mean 'v_proj'"):
        made(target_modules=["q_proj", "v_prj"])


def test_s2_a_module_to_save_that_matches_nothing() -> None:
    with pytest.raises(TargetError, match="'lm_haed' matches no module.*Did you mean 'lm_head'"):
        made(modules_to_save=["lm_haed"])


def test_s3_a_module_to_save_is_a_whole_name() -> None:
    names = [n for n, p in made(modules_to_save=["norm"]).named_parameters() if p.requires_grad]
    assert [n for n in names if "norm" in n] == [
        "base_model.model.model.norm.modules_to_save.default.weight"
    ]


def test_s4_a_layer_that_is_not_there() -> None:
    with pytest.raises(TargetError, match=r"no target lies in layers \[7\]"):
        made(layers_to_transform=[0, 7])


@pytest.mark.parametrize("ours", [True, False])
def test_s5_a_file_with_other_keys(ours: bool, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if not ours:
        (tmp_path / "trimtab.json").unlink()
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({**tensors, key.replace("layers.0", "layers.9"): tensors[key].clone()}, file)
    with pytest.raises(errors.TrimtabError, match=r"layers\.9"):
        peft.PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("option", ["is_trainble", "lora_alpha"])
def test_s6_an_option_that_does_not_exist(option: str, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    with pytest.raises(UnknownNameError, match=option):
        peft.PeftModel.from_pretrained(base(), tmp_path, **{option: 3})
    with pytest.raises(UnknownNameError, match="Did you mean 'lora_alpha'"):
        peft.LoraConfig(lora_alfa=3)  # type: ignore[call-arg]


def test_s7_loading_onto_a_name_takes_its_configuration_too(tmp_path: Path) -> None:
    saved = made(lora_alpha=64)
    saved.save_pretrained(tmp_path)
    model = made(lora_alpha=4)
    with pytest.warns(UserWarning, match="was of another configuration"):
        model.load_adapter(tmp_path, "default")
    assert close(logits(model), logits(saved)) and model.peft_config["default"].lora_alpha == 64


@pytest.mark.parametrize("name", ["layers", "self_attn", "model"])
def test_s8_an_adapter_called_like_a_module(name: str, tmp_path: Path) -> None:
    model = made()
    expected = logits(model)
    model.add_adapter(name, peft.LoraConfig(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    assert close(logits(peft.PeftModel.from_pretrained(base(), tmp_path)), expected)


def test_s9_a_weighted_adapter_under_a_name_that_is_taken() -> None:
    model = made()
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(DuplicateNameError):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "b")


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}],
    ids=["s10 rslora", "s11 dora", "s12 pissa"],
)  # fmt: skip
def test_s10_to_s12_one_adapter_of_weight_one_is_itself(options: dict[str, Any]) -> None:
    """Or an error, where there is no such sum; and neither the base nor the first adapter changes."""
    model = made(r=16, **options)
    expected = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    try:
        model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
    except errors.TrimtabError:
        assert options == {"use_dora": True}
    else:
        model.set_adapter("copy")
        assert close(logits(model), expected)
        model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)


def test_s13_repeated_layers() -> None:
    model = made(layer_replication=[[0, 2], [1, 2]])
    kit.filled(model)
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert len(merged.model.layers) == 3 and close(logits(merged), expected)


def test_s14_merging_into_a_tied_head() -> None:
    model = peft.get_peft_model(
        base(tie_word_embeddings=True), peft.LoraConfig(r=4, target_modules=["lm_head"])
    )
    kit.filled(model)
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert close(logits(merged), expected) and not merged.config.tie_word_embeddings


def test_s15_merging_back_and_forth() -> None:
    model = made().to(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_base_layer().weight.clone()
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_s16_merging_an_adapter_that_is_not_active() -> None:
    model = made(modules_to_save=["lm_head"])
    expected = logits(model)
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("b")
    assert close(logits(model.merge_and_unload(adapter_names=["default"])), expected)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        peft.VeraConfig(r=8, target_modules=["q_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["ia3", "vera", "prompt"],
)
def test_s17_an_adapter_for_each_row_whatever_the_method(config: peft.PeftConfig) -> None:
    model = peft.get_peft_model(base(), config).eval()
    kit.filled(model, scale=0.5)
    alone = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    mixed = logits(model, adapter_names=["default", "__base__", "default", "__base__"])
    assert close(mixed[::2], alone[::2]) and close(mixed[1::2], bare[1::2])
    assert not close(alone, bare)


def test_s18_another_base(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    other = base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    with pytest.raises(BaseMismatchError, match="the weights differ"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_s19_loading_leaves_the_mode_of_the_model(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    model = made().train()
    model.load_adapter(tmp_path, "ref")
    assert all(module.training for module in model.modules() if isinstance(module, nn.Linear))


def test_s20_what_was_loaded_to_be_used_is_not_trained(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), tmp_path)
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == 0


def test_s21_disabled_is_the_base_with_biases_too() -> None:
    plain = kit.loud(tiny.gpt2())
    expected = logits(plain)
    config = peft.LoraConfig(r=2, bias="all", target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(plain, config).eval()
    kit.filled(model)
    assert not close(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_s22_preparing_converts_no_weight() -> None:
    model = peft.prepare_model_for_kbit_training(base().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_s23_a_configuration_is_left_as_it_is() -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    before = config.to_dict()
    peft.get_peft_model(kit.loud(tiny.bert()), config)
    assert config.to_dict() == before


def test_s24_saving_a_bias_of_the_second_factor_raises_no_alarm(tmp_path: Path) -> None:
    model = made(lora_bias=True)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert any(
        key.endswith(".lora_B.bias") for key in load_file(tmp_path / "adapter_model.safetensors")
    )


@pytest.mark.parametrize("stored", ["gpt2-int8", "llama-nf4", "llama"])
def test_s25_a_bias_of_the_second_factor_is_merged_at_its_scale(stored: str) -> None:
    """On layers without a bias too, where PEFT cannot merge it."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", lora_bias=True)
    model = peft.get_peft_model(tiny.CASES[stored].model(torch.float32), config)
    kit.filled(model)
    expected = logits(model.eval())
    assert not close(expected, logits(model.unload()))
    model = peft.get_peft_model(tiny.CASES[stored].model(torch.float32), config)
    kit.filled(model)
    assert close(logits(model.eval().merge_and_unload()), expected)


def test_s26_experts_leave_nothing_behind() -> None:
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(tiny.mixtral(), config).eval()
    modules = [name for name, _ in model.named_modules()]
    logits(model)
    assert [name for name, _ in model.named_modules()] == modules


def test_two_adapters_of_one_name() -> None:
    model = made()
    with pytest.raises(DuplicateNameError):
        model.add_adapter("default", peft.LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(AttachError, match="is a PeftModel already"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS))


def test_the_page_has_all_of_them_and_names_real_errors() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| S(\d+) \|(.*)\|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 27))
    prose = text.partition("## Names")[0]
    said = [name for name in re.findall(r"`(\w+Error)`", prose) if name not in dir(builtins)]
    assert len(said) > 10 and all(
        issubclass(getattr(errors, name), errors.TrimtabError) for name in said
    )
