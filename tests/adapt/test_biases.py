"""Biases that are trained beside a method (PEFT's option ``bias``): what belongs to whom, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab as tt
from tests.laws.cells import shaken
from tests.oracles import kit
from trimtab.errors import ConfigError, TargetError, UnsupportedError
from trimtab.peft import LoraConfig, OFTConfig, VeraConfig, get_peft_model

OURS = "oft(block=8, targets='query', bias='all')"


def test_biases_learn_at_the_rate_of_the_method_beside_them() -> None:
    """As in PEFT, which has one rate; in a union each part has its own."""
    assert tt.attach(kit.bert(), OURS, "a").rates == {}
    union = tt.attach(kit.bert(), "oft(block=8, targets='query')|bitfit", "a")
    assert set(union.rates.values()) == {tt.BitFit.lr / tt.OFT.lr}


@pytest.mark.parametrize(
    "text", ["bitfit|lora(rank=2, targets='query', bias='all')", f"bitfit|{OURS}"]
)
def test_a_copy_of_a_bias_and_a_change_of_it_stand_beside_each_other(
    text: str, tmp_path: Path
) -> None:
    model = kit.bert()
    adapter = shaken(tt.attach(model, text, "a"))
    copies = [n for n in adapter.owners if n.slot.startswith("lora_bias")]
    assert copies
    assert all(adapter.owners[name] for name in copies)
    before = kit.outputs(model, kit.batch_of(model))
    adapter.save(tmp_path / "a")
    again = kit.bert()
    tt.attach(again, tt.Adapter.load(tmp_path / "a"))
    assert torch.equal(kit.outputs(again, kit.batch_of(again)), before)


def test_modules_that_are_trained_in_full_have_their_own_biases() -> None:
    adapter = tt.attach(kit.bert(), tt.method(OURS).replace(train=("classifier",)), "a")
    paths = {name.path for name in adapter.named() if name.slot.startswith("lora_bias")}
    assert "classifier" not in paths
    assert "bert.embeddings.LayerNorm" in paths


def test_sums_and_multiples_are_refused() -> None:
    adapter = tt.attach(kit.bert(), "vera(rank=4, targets='query', bias='targets')", "a")
    with pytest.raises(UnsupportedError, match="no sums and no multiples"):
        tt.scaled(adapter, 0.5)


@pytest.mark.parametrize("bias", ["all", "targets"])
def test_a_model_without_biases_is_refused(bias: str) -> None:
    with pytest.raises(TargetError, match="has a bias to be trained; leave bias at 'none'"):
        tt.attach(kit.llama(), f"oft(block=8, bias='{bias}')", "a")


def test_a_word_that_peft_does_not_know_is_refused() -> None:
    """PEFT takes it, and raises when the model is wrapped."""
    for config in (OFTConfig, VeraConfig, LoraConfig):
        with pytest.raises(ConfigError, match="bias must be none, all"):
            config(target_modules=["query"], bias="some")


def test_the_face_trains_what_the_option_says_and_disables_to_the_base() -> None:
    model = get_peft_model(
        kit.bert(), OFTConfig(target_modules=["query"], oft_block_size=8, bias="oft_only")
    )
    shaken(model.base_model.adapters["default"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"oft_R" in n or "lora_bias" in n for n in trained} == {True}
    batch = kit.batch_of(kit.bert())
    with model.disable_adapter():
        assert torch.equal(kit.outputs(model, batch), kit.outputs(kit.bert(), batch))
    merged = kit.outputs(model, batch)
    kit.assert_close(kit.outputs(model.merge_and_unload(), batch), merged, "merged")
