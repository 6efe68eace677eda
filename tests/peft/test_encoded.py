"""Prompts that an encoder makes: state dicts and folders hold the prompt alone, as PEFT's, and training can go on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import trimtab.peft as ours
from tests import tiny
from trimtab.errors import FileFormatError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LENGTH = 5
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
    "prefix": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
}  # fmt: skip
every = pytest.mark.parametrize("kind", CONFIGS)


def made(package: Any, kind: str) -> Any:
    name, options = CONFIGS[kind]
    config = getattr(package, name)(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.get_peft_model(tiny.llama(), config).eval()


def both(kind: str) -> tuple[Any, Any]:
    """Our model and PEFT's with the same encoder: the names of what is trained are the same."""
    mine, theirs = made(ours, kind), made(peft, kind)
    state = theirs.state_dict()
    mine.load_state_dict({key: state[key] for key in mine.state_dict()})
    return mine, theirs


def read(package: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.PeftModel.from_pretrained(tiny.llama(), folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of the text: PEFT's have those of virtual tokens in front, where a prompt stands before it."""
    found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found[:, -IDS.shape[1] :]


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-4)


@every
def test_state_dicts_are_pefts(kind: str) -> None:
    mine, theirs = both(kind)
    assert close(logits(mine), logits(theirs))
    found, wanted = ours.get_peft_model_state_dict(mine), peft.get_peft_model_state_dict(theirs)
    assert found.keys() == wanted.keys() == {"prompt_embeddings"}
    assert close(found["prompt_embeddings"], wanted["prompt_embeddings"])
    gathered = ours.get_peft_model_state_dict(mine, mine.state_dict())
    assert torch.equal(gathered["prompt_embeddings"], found["prompt_embeddings"])
    saved = mine.get_prompt_embedding_to_save("default")
    assert torch.equal(saved, found["prompt_embeddings"])


@every
def test_folders_are_read_by_both(kind: str, tmp_path: Path) -> None:
    mine, theirs = both(kind)
    mine.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    ]
    assert files[0].keys() == files[1].keys()
    assert close(files[0]["prompt_embeddings"], files[1]["prompt_embeddings"])
    said = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs")
    ]
    assert said[0]["peft_type"] == said[1]["peft_type"]
    wanted = logits(theirs)
    for folder in ("ours", "theirs"):
        for package in (ours, peft):
            model = read(package, tmp_path / folder)
            assert close(logits(model), wanted), (folder, package.__name__)
    read(ours, tmp_path / "ours").save_pretrained(tmp_path / "again")
    assert close(logits(read(peft, tmp_path / "again")), wanted)


@every
def test_training_goes_on_from_a_folder(kind: str, tmp_path: Path) -> None:
    mine, _ = both(kind)
    mine.save_pretrained(tmp_path)
    again = ours.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    own, new = mine.state_dict(), again.state_dict()
    assert own.keys() == new.keys() and all(torch.equal(own[key], new[key]) for key in own)
    first, second = (model.peft_config["default"].options() for model in (mine, again))
    told = {name for name, value in first.items() if value is not None}
    assert {name: second[name] for name in told} == {name: first[name] for name in told}
    kept = dict(mine.named_parameters())
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    mine.load_adapter(tmp_path, "default")  # as Trainer does with the best checkpoint
    assert all(parameter is kept[name] for name, parameter in mine.named_parameters())
    assert all(torch.equal(value, own[key]) for key, value in mine.state_dict().items())


@every
def test_a_state_dict_of_the_prompt_alone_takes_the_place_of_the_encoder(kind: str) -> None:
    mine, theirs = made(ours, kind), made(peft, kind)
    with pytest.warns(UserWarning, match="without the encoder"):
        ours.set_peft_model_state_dict(mine, peft.get_peft_model_state_dict(theirs))
    assert close(logits(mine), logits(theirs))
    assert mine.active_adapters == ["default"]
    assert [n for n, p in mine.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]


def test_an_encoder_that_makes_another_prompt_is_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        model = made(ours, "mlp")
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.add_(number)
        model.save_pretrained(tmp_path / name)
    name = "trimtab_encoder.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    ours.PeftModel.from_pretrained(tiny.llama(), tmp_path / "one")
    with pytest.raises(FileFormatError, match="another prompt"):
        ours.PeftModel.from_pretrained(tiny.llama(), tmp_path / "one", is_trainable=True)
    plain = ours.PromptTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
    ours.get_peft_model(tiny.llama(), plain).save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / name).exists(), "of the adapter that was there before"


# -- an encoder-decoder's prefix ------------------------------------------------------------------------


def prefixed(package: Any) -> Any:
    config = package.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="SEQ_2_SEQ_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.get_peft_model(tiny.t5(), config).eval()


def test_a_prefix_of_an_encoder_decoder_is_laid_out_anew(tmp_path: Path) -> None:
    """PEFT's table of the same shape means other entries; ours has a key of its own."""
    theirs, mine = prefixed(peft), prefixed(ours)
    theirs.save_pretrained(tmp_path)
    read = ours.PeftModel.from_pretrained(tiny.t5(), tmp_path).eval()
    own = ours.get_peft_model_state_dict(mine)
    assert list(own) == ["base_model.prompt_encoder.embedding.weight"]
    ours.set_peft_model_state_dict(mine, peft.get_peft_model_state_dict(theirs))
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    with torch.no_grad():
        assert torch.equal(mine(**inputs).logits, read(**inputs).logits)
    ours.set_peft_model_state_dict(mine, own)
    found = ours.get_peft_model_state_dict(mine)
    assert all(torch.equal(found[key], own[key]) for key in own)
    mine.save_pretrained(tmp_path / "ours")
    again = ours.PeftModel.from_pretrained(tiny.t5(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(mine(**inputs).logits, again(**inputs).logits)
