"""aLoRA against PEFT's: outputs, gradients, mixed batches and generation, from the files of either."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import trimtab as tt
import trimtab.peft as ours
from tests.oracles import kit
from trimtab.errors import UnsupportedError

CALL = [5, 9]
OPTIONS: dict[str, Any] = {
    "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM",
    "alora_invocation_tokens": CALL,
}  # fmt: skip


def text() -> Tensor:
    """Left-padded rows that are invoked in the middle, twice, never and at the end."""
    ids = torch.randint(10, 90, (4, 10), generator=torch.Generator().manual_seed(4))
    for row, start in ((0, 5), (1, 3), (1, 6), (3, 8)):
        ids[row, start : start + 2] = torch.tensor(CALL)
    ids[2:, :2] = 0
    return ids


def batch() -> dict[str, Tensor]:
    return {"input_ids": text(), "attention_mask": (text() != 0).long()}


def theirs(**options: Any) -> PeftModel:
    with kit.quiet():
        made = get_peft_model(kit.llama(), LoraConfig(**OPTIONS, **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made.eval()


def test_it_is_pefts_function_from_its_file(tmp_path: Path) -> None:
    other = theirs()
    with kit.quiet():
        other.save_pretrained(tmp_path)
    model = kit.llama()
    adapter = tt.attach(model, tt.Adapter.load(tmp_path), "default")
    assert dict(adapter.method)["invocation"] == tuple(CALL)
    kit.assert_same_function(model, other, kit.paired(adapter, other), batch())
    assert kit.acts(model, "default", batch())


def test_peft_reads_ours(tmp_path: Path) -> None:
    base = kit.llama()
    model = ours.get_peft_model(base, ours.LoraConfig(**OPTIONS)).eval()
    kit.stir(model.base_model.adapters["default"])
    model.save_pretrained(tmp_path)
    with kit.quiet():
        other = PeftModel.from_pretrained(kit.llama(), tmp_path).eval()
    again = ours.PeftModel.from_pretrained(kit.llama(), tmp_path).eval()
    assert again.peft_config["default"].alora_invocation_tokens == CALL
    with torch.no_grad():
        expected = kit.outputs(model, batch())
        kit.assert_close(expected, kit.outputs(other, batch()), "outputs")
        kit.assert_close(expected, kit.outputs(again, batch()), "read again")


def test_mixed_batches_are_pefts(tmp_path: Path) -> None:
    other = theirs()
    second = {**OPTIONS, "alora_invocation_tokens": None, "r": 2}
    with kit.quiet():
        other.add_adapter("plain", LoraConfig(**second))
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if ".plain." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        other.save_pretrained(tmp_path)
    model = ours.PeftModel.from_pretrained(kit.llama(), tmp_path).eval()
    model.load_adapter(tmp_path / "plain", "plain")
    for names in (
        ["default", "plain", "default", "default"],
        ["__base__", "default", "plain", "default"],
    ):
        with torch.no_grad():
            mine = model(**batch(), adapter_names=names).logits
            peft = other(**batch(), adapter_names=names).logits
        kept = batch()["attention_mask"].bool()
        kit.assert_close(mine[kept], peft[kept], str(names))


def test_generation_is_pefts() -> None:
    other = theirs()
    model = ours.get_peft_model(kit.llama(), ours.LoraConfig(**OPTIONS)).eval()
    kit.give(
        {k: (v, u) for k, (u, v) in kit.paired(model.base_model.adapters["default"], other).items()}
    )
    settings: dict[str, Any] = {
        **batch(),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with torch.no_grad(), kit.quiet():
        assert torch.equal(model.generate(**settings), other.generate(**copy.copy(settings)))


def test_merging_is_refused_with_the_reason() -> None:
    model = ours.get_peft_model(kit.llama(), ours.LoraConfig(**OPTIONS))
    for deed in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match="a merged weight acts everywhere"):
            deed()
    with pytest.raises(NotImplementedError):
        theirs().merge_adapter()
