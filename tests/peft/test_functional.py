"""What stands at the side: ``peft.functional``, EVA from a state dict, and PEFT's names of errors and warnings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab.peft as ours
from tests import tiny
from tests.peft.test_configs import batches
from trimtab.errors import ConfigError, FileFormatError, TargetError
from trimtab.peft import functional

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_adapters_in_a_bare_model_are_switched_and_deleted() -> None:
    model = tiny.llama()
    base = logits(model)
    for name in ("one", "two"):
        config = ours.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        functional.inject_adapter_in_model(config, model, name)
    functional.set_adapter(model, "two")
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns and all(".two." in name for name in learns)
    second = logits(model)
    functional.set_adapter(model, ["one", "two"], inference_mode=True)
    assert not torch.allclose(logits(model), second)
    assert not any(p.requires_grad for p in model.parameters())
    functional.set_requires_grad(model, "one")
    assert all(".one." in n for n, p in model.named_parameters() if p.requires_grad)
    state = functional.get_peft_model_state_dict(model, adapter_name="two")
    assert functional.delete_adapter(model, "one", prefix="lora_") == ["two"]
    assert torch.equal(logits(model), second)
    functional.set_peft_model_state_dict(model, state, "two")
    functional.cast_adapter_dtype(model, "two", autocast_adapter_dtype=False)
    assert functional.delete_adapter(model, "two") is None
    assert torch.equal(logits(model), base) and not model.__dict__["peft_config"]


def eva(package: Any) -> Any:
    options: dict[str, Any] = {
        "r": 8,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": "eva",
    }
    more = {"eva_config": peft.EvaConfig()} if package is peft else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.get_peft_model(tiny.llama(), package.LoraConfig(**options, **more))


def test_the_state_dict_of_eva_is_pefts_and_begins_a_lora() -> None:
    data, mine, theirs = batches()[:1], eva(ours), eva(peft)
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    found = ours.get_eva_state_dict(mine, data)
    assert all(torch.equal(value, before[key]) for key, value in mine.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.get_eva_state_dict(theirs, data, show_progress_bar=False)
    assert found.keys() == wanted.keys()
    for name, directions in found.items():
        assert torch.allclose(directions.abs(), wanted[name].float().abs(), atol=1e-3, rtol=1e-2)
    other = eva(ours)
    ours.initialize_lora_eva_weights(mine, data)
    ours.initialize_lora_eva_weights(other, eva_state_dict=found)
    first, second = mine.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    left, right = (m.peft_config["default"] for m in (mine, other))
    assert (left.rank_pattern, left.alpha_pattern) == (right.rank_pattern, right.alpha_pattern)
    with pytest.raises(ConfigError, match="is no target"):
        ours.initialize_lora_eva_weights(
            eva(ours), eva_state_dict={"model.norm": torch.ones(2, 32)}
        )
    with pytest.raises(ConfigError, match="which positions count"):
        ours.get_eva_state_dict(mine, data, prepare_layer_inputs_fn=lambda *_: None)  # type: ignore[arg-type]


def test_a_forward_function_says_how_the_model_is_called() -> None:
    mine, other, data = eva(ours), eva(ours), batches()[:1]
    wrapped = [{"inside": batch} for batch in data]

    def forward(model: Any, batch: Any) -> Any:
        return model(**batch["inside"])

    ours.initialize_lora_eva_weights(mine, wrapped, forward_fn=forward)
    ours.initialize_lora_eva_weights(other, data)
    first, second = mine.state_dict(), other.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in second)
    with pytest.raises(ConfigError, match="did not call"):
        ours.get_eva_state_dict(mine, wrapped, forward_fn=lambda model, batch: None)


def test_what_lora_ga_saw_is_kept_in_a_file(tmp_path: Path) -> None:
    file, made = tmp_path / "seen" / "calls.safetensors", []
    for step in (True, False):
        model = tiny.llama()
        config = ours.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="lora_ga")

        def train_step(model: Any = model, step: bool = step) -> None:
            assert step, "the file says what there was to see"
            for batch in batches()[:2]:
                model(**batch, use_cache=False).loss.backward()

        ours.preprocess_loraga(model, config, train_step, cache_file=file)
        torch.manual_seed(3)
        made.append(ours.get_peft_model(model, config).state_dict())
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    file.write_bytes(b"torn")
    with pytest.raises(FileFormatError):
        ours.preprocess_loraga(tiny.llama(), config, lambda: None, cache_file=file)


def test_errors_and_warnings_have_pefts_names() -> None:
    assert issubclass(ours.NoMatchingPeftModuleError, ours.PeftError | ValueError)
    with pytest.raises(ours.NoMatchingPeftModuleError) as caught:
        ours.get_peft_model(tiny.llama(), ours.LoraConfig(target_modules=["nothing"]))
    assert isinstance(caught.value, TargetError) and isinstance(caught.value, ours.PeftError)
    config = ours.LoraConfig(target_modules=["q_proj"], init_lora_weights="eva")
    with pytest.warns(ours.PeftWarning, match="begins without data"):
        ours.get_peft_model(tiny.llama(), config)
