"""``layer_replication`` against PEFT's: the same frozen layers several times, each with adapters of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trimtab as tt
import trimtab.peft as ours
from tests import tiny
from tests.oracles import kit
from trimtab.adapt.files import CONFIG
from trimtab.errors import AttachError, ConfigError, TargetError, UnsupportedError

RANGES = [(0, 2), (1, 3)]
OPTIONS: dict[str, Any] = {
    "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM",
    "layer_replication": RANGES,
}  # fmt: skip


def make() -> nn.Module:
    return kit.loud(lambda: tiny.llama(num_hidden_layers=3))()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(before[k], v) for k, v in now.items())


def test_it_is_pefts_function_and_each_repetition_learns_by_itself() -> None:
    base = make()
    before, layers = state(base), list(base.model.layers)  # type: ignore[union-attr,arg-type]
    model = ours.get_peft_model(base, ours.LoraConfig(**OPTIONS)).eval()
    with kit.quiet():
        other = get_peft_model(make(), LoraConfig(**copy.deepcopy(OPTIONS))).eval()  # type: ignore[arg-type]
    assert base.config.num_hidden_layers == other.config.num_hidden_layers == 4
    adapter = model.base_model.adapters["default"]
    kit.stir(adapter)
    pairs = kit.paired(adapter, other)
    kit.give(pairs)
    batch = kit.batch_of(base)
    kit.assert_same_function(base, other, pairs, batch)
    layer = base.model.layers  # type: ignore[union-attr]
    assert (
        layer[1].mlp.up_proj.weight is layer[2].mlp.up_proj.weight is layers[1].mlp.up_proj.weight
    )
    settings: dict[str, Any] = {**batch, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(settings["input_ids"])
    with torch.no_grad(), kit.quiet():
        assert torch.equal(model.generate(**settings), other.generate(**settings))
    model.unload()
    assert list(base.model.layers) == layers and base.config.num_hidden_layers == 3  # type: ignore[union-attr,arg-type]
    assert [block.self_attn.layer_idx for block in layers] == [0, 1, 2]
    assert same(base, before)


def test_files_go_both_ways(tmp_path: Path) -> None:
    model = ours.get_peft_model(make(), ours.LoraConfig(**OPTIONS)).eval()
    kit.stir(model.base_model.adapters["default"])
    batch = kit.batch_of(make())
    with torch.no_grad():
        expected = kit.outputs(model, batch)
    model.save_pretrained(tmp_path / "ours")
    with kit.quiet(), torch.no_grad():
        other = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        kit.assert_close(kit.outputs(other, batch), expected, "ours, read by theirs")
        other.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = ours.PeftModel.from_pretrained(make(), tmp_path / folder).eval()
        with torch.no_grad():
            kit.assert_close(kit.outputs(again, batch), expected, f"{folder}, read by ours")
    plain = make()
    with pytest.raises(AttachError, match="Repeat them first: trimtab.repeat_blocks"):
        tt.attach(plain, tt.Adapter.load(tmp_path / "theirs"))
    tt.repeat_blocks(plain, RANGES)
    tt.attach(plain, tt.Adapter.load(tmp_path / "theirs"), "a")
    with torch.no_grad():
        kit.assert_close(kit.outputs(plain, batch), expected, "the core")
    with pytest.raises(AttachError, match="detach them first"):
        tt.restore_blocks(plain)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"use_dora": True}, True),
        ({"kasa_config": {"beta": 0.1}}, True),
        ({"lora_bias": True}, True),
        ({"velora_config": {"num_groups": 4}}, True),
        ({"init_lora_weights": "mica"}, True),
        ({"init_lora_weights": "pissa"}, False),
        (
            {
                "init_lora_weights": "loftq",
                "loftq_config": {"loftq_bits": 4, "loftq_iter": 2},
                "lora_alpha": 3,
            },
            False,
        ),
    ],
)
def test_variants_are_repeated_too(options: dict[str, Any], known: bool, tmp_path: Path) -> None:
    given = {**OPTIONS, **options}
    model = ours.get_peft_model(make(), ours.LoraConfig(**copy.deepcopy(given))).eval()
    kit.stir(model.base_model.adapters["default"])
    batch = kit.batch_of(make())
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad(), kit.quiet():
        expected = kit.outputs(model, batch)
        again = ours.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        kit.assert_close(kit.outputs(again, batch), expected, "read again")
        if known:
            other = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
            kit.assert_close(kit.outputs(other, batch), expected, "ours, read by theirs")
            return
        assert "TRIMTAB_LORA" in (tmp_path / "ours" / CONFIG).read_text()
        get_peft_model(make(), LoraConfig(**copy.deepcopy(OPTIONS))).save_pretrained(tmp_path)  # type: ignore[arg-type]
    said = json.loads(
        (tmp_path / CONFIG).read_text()
    )  # as PEFT writes it: LoftQ needs bitsandbytes there
    (tmp_path / CONFIG).write_text(json.dumps({**said, **options}))
    with pytest.raises(UnsupportedError, match="weight that repeated layers share"):
        tt.Adapter.load(tmp_path)


def test_merging_is_right_and_the_base_is_not_written(tmp_path: Path) -> None:
    """S13: PEFT merges every repetition into the one weight that they share."""
    base = make()
    before = state(base)
    model = ours.get_peft_model(base, ours.LoraConfig(**OPTIONS)).eval()
    kit.stir(model.base_model.adapters["default"])
    batch = kit.batch_of(base)
    with torch.no_grad():
        expected = kit.outputs(model, batch)
        model.merge_adapter()
        kit.assert_close(kit.outputs(model, batch), expected, "merged in place")
        model.unmerge_adapter()
        assert torch.equal(kit.outputs(model, batch), expected)
        kit.assert_close(kit.outputs(tt.merge(base, "default"), batch), expected, "a new model")
        merged = model.merge_and_unload()
        kit.assert_close(kit.outputs(merged, batch), expected, "merged")
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        kit.assert_close(kit.outputs(loaded, batch), expected, "saved and loaded")
    fresh = make()
    assert same(fresh, before)


def test_what_does_not_fit_is_refused() -> None:
    base = make()
    before = state(base)
    with pytest.raises(ConfigError, match="are no blocks of this model"):
        ours.get_peft_model(base, ours.LoraConfig(**{**OPTIONS, "layer_replication": [(0, 4)]}))
    with pytest.raises(TargetError):
        ours.get_peft_model(base, ours.LoraConfig(**{**OPTIONS, "target_modules": ["q_prj"]}))
    assert same(base, before) and base.config.num_hidden_layers == 3
    with pytest.raises(UnsupportedError, match="no one list of blocks"):
        tt.repeat_blocks(kit.t5(), [(0, 1)])
    model = ours.get_peft_model(base, ours.LoraConfig(**OPTIONS))
    model.add_adapter("second", ours.LoraConfig(**OPTIONS))
    with pytest.raises(ConfigError, match="repeated already, as"):
        model.add_adapter("third", ours.LoraConfig(**{**OPTIONS, "layer_replication": [(0, 3)]}))
    with pytest.raises(AttachError, match="detach them first"):
        tt.repeat_blocks(base, RANGES)
