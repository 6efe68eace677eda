"""A user's session with the hub: run as a program, with the hub's address in ``HF_ENDPOINT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trimtab.peft as ours
from tests import tiny
from tests.data import kit
from tests.peft.ecosystem_kit import filled, lora
from trimtab.errors import FileFormatError, StorageError


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(3, 9)[None]).logits
    return found


def expect(truth: bool, what: str) -> None:
    if not truth:
        raise AssertionError(what)


def push() -> Tensor:
    """The base, an adapter of it with a tokenizer, and one more in a folder and on a branch."""
    base = tiny.llama(vocab_size=300)
    base.push_to_hub("me/base")
    base = AutoModelForCausalLM.from_pretrained("me/base")
    model = filled(ours.get_peft_model(base, lora(ours)))
    model.add_adapter("other", lora(ours, r=2))
    filled(model, "other")
    info = model.push_to_hub("me/adapter", commit_message="An adapter", tags=["mine"])
    expect(bool(info.oid), "the commit has a name")
    model.push_to_hub("me/adapter", revision="later", private=True)
    model.peft_config["default"].push_to_hub("me/config")
    expected = logits(model)
    model.set_adapter("other")
    return torch.stack([expected, logits(model)])


def load(expected: Tensor) -> None:
    """By name: onto a base, with its base, from a branch, from a folder of the repository."""
    model = ours.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("me/base"), "me/adapter"
    )
    expect(torch.equal(logits(model), expected[0]), "PeftModel.from_pretrained")
    expect(model.peft_config["default"].base_model_name_or_path == "me/base", "the base's name")
    model.load_adapter("me/adapter", "other", subfolder="other")
    model.set_adapter("other")
    expect(torch.equal(logits(model), expected[1]), "load_adapter with a subfolder")
    for options in ({}, {"revision": "later"}, {"is_trainable": True}):
        auto = ours.AutoPeftModelForCausalLM.from_pretrained("me/adapter", **options)
        expect(torch.equal(logits(auto), expected[0]), f"AutoPeftModelForCausalLM {options}")
    auto = ours.AutoPeftModelForCausalLM.from_pretrained("me/adapter", subfolder="other")
    expect(torch.equal(logits(auto), expected[1]), "AutoPeftModelForCausalLM with a subfolder")
    config = ours.PeftConfig.from_pretrained("me/config")
    expect(isinstance(config, ours.LoraConfig) and config.r == 4, "the configuration alone")


def grow() -> None:
    """A tokenizer with more tokens beside an adapter that trains their embeddings: the base's grow to hold them."""
    tokenizer = kit.byte_level()
    base = AutoModelForCausalLM.from_pretrained("me/base")
    base.resize_token_embeddings(len(tokenizer))
    config = lora(ours, modules_to_save=["embed_tokens", "lm_head"])
    model = filled(ours.get_peft_model(base, config))
    model.push_to_hub("me/grown")
    tokenizer.push_to_hub("me/grown")
    auto = ours.AutoPeftModelForCausalLM.from_pretrained("me/grown")
    expect(auto.get_input_embeddings().weight.shape[0] == len(tokenizer) > 300, "the vocabulary")
    expect(torch.equal(logits(auto), logits(model)), "the grown model")


def refuse() -> None:
    """What is not there, and what the hub does not take, is said."""
    for name, error in (("me/nothing", StorageError), ("me/base", FileFormatError)):
        try:
            ours.PeftConfig.from_pretrained(name)
        except error as found:
            expect(name in str(found), str(found))
        else:
            raise AssertionError(f"{name} was read")
    try:
        ours.LoraConfig(r=2).push_to_hub("me/adapter", revision="refs/pr/9")
    except StorageError as found:
        expect("me/adapter" in str(found), str(found))
    else:
        raise AssertionError("pushed to a pull request that is not there")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    expected = push()
    load(expected)
    grow()
    refuse()
    folder.joinpath("done").write_text("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
