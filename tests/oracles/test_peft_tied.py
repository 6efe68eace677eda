"""``ensure_weight_tying`` against PEFT's: an embedding and a head that share their weight share what is trained.

PEFT's two ends of a LoRA are two parameters in the same memory, each with a gradient of its own; here it is one, and
has the sum of both.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import trimtab as tt
import trimtab.peft as ours
from tests import tiny
from tests.oracles import kit
from trimtab.errors import AttachError, ConfigError

CASES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "tokens of both": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}
    },
}  # fmt: skip


def make() -> nn.Module:
    return kit.loud(lambda: tiny.llama(tie_word_embeddings=True))()


def options(case: str, **more: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **copy.deepcopy(CASES[case]), **more}


def theirs(case: str, **more: Any) -> PeftModel:
    with kit.quiet("Model has `tie_word", "You have requested"):
        made = get_peft_model(make(), LoraConfig(**options(case, **more)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "lm_head" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def save(model: PeftModel, folder: Path) -> None:
    with kit.quiet("Model has `tie_word", "Setting `save_embedding"):
        model.save_pretrained(folder)


def gradients(model: nn.Module, batch: kit.Batch) -> Tensor:
    out = kit.outputs(model, batch)
    kit.objective(out).backward()
    return out.detach()


@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts_function_from_its_file(case: str, tmp_path: Path) -> None:
    other = theirs(case, ensure_weight_tying=True)
    save(other, tmp_path)
    base = make()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    adapter = tt.attach(base, tt.Adapter.load(tmp_path), "default")
    batch = kit.batch_of(base)
    kit.assert_close(gradients(base, batch), gradients(other, batch), "outputs")
    named = {n: p.grad for n, p in other.named_parameters() if p.requires_grad}
    for name, tensor in adapter.named().items():
        assert name.path != "lm_head"
        rows = name.slot == "trainable_tokens_delta"
        wrapped = f"base_model.model.{name.path}.token_adapter.{name.slot}.default"
        expected = named[wrapped if rows else kit.peft_name(other, name)]
        assert expected is not None and tensor.grad is not None
        twin = {
            "lora_embedding_A": "base_model.model.lm_head.lora_B.default.weight",
            "lora_embedding_B": "base_model.model.lm_head.lora_A.default.weight",
        }.get(name.slot)
        if twin is not None:
            other_end = named[twin]
            assert other_end is not None
            expected = expected + other_end.T
        kit.assert_close(tensor.grad, expected, name.key)
    merged = tt.merge(base, "default")
    with torch.no_grad():
        torch.testing.assert_close(
            kit.outputs(merged, batch), kit.outputs(base, batch), atol=1e-4, rtol=1e-4
        )
    tt.detach(base, "default")
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_peft_and_the_face_read_ours(case: str, tmp_path: Path) -> None:
    base = make()
    model = ours.get_peft_model(base, ours.LoraConfig(**options(case, ensure_weight_tying=True)))
    model.eval()
    adapter = model.base_model.adapters["default"]
    kit.stir(adapter)
    batch = kit.batch_of(base)
    with torch.no_grad():
        expected = kit.outputs(model, batch)
        with model.disable_adapter():
            assert (expected - kit.outputs(model, batch)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert tt.Adapter.load(tmp_path) == adapter
    with kit.quiet("Model has `tie_word", "Found missing adapter keys", "You have requested"):
        other = PeftModel.from_pretrained(make(), tmp_path).eval()
    again = ours.PeftModel.from_pretrained(make(), tmp_path).eval()
    (tmp_path / "trimtab.json").unlink()
    as_pefts = make()
    tt.attach(as_pefts, tt.Adapter.load(tmp_path), "a")
    with torch.no_grad():
        kit.assert_close(kit.outputs(other, batch), expected, "PEFT reads it")
        kit.assert_close(kit.outputs(again, batch), expected, "the face reads it")
        kit.assert_close(kit.outputs(as_pefts, batch), expected, "without trimtab.json")
    second = tt.add([adapter.detached(), adapter.detached()], name="s", weights=[0.25, 0.75]) if (
        "saved" not in case and "tokens" not in case
    ) else None  # fmt: skip
    if second is not None:
        tt.attach(base, second)
        with tt.using(base, "s"), torch.no_grad():
            kit.assert_close(kit.outputs(base, batch), expected, "a sum")


def test_both_ends_learn_one_tensor_and_rows_keep_their_own() -> None:
    model = make()
    method = tt.LoRA(rank=2, targets=("embed_tokens", "q_proj"), tie=True)
    one = tt.attach(model, method, "a")
    two = tt.attach(
        model, tt.LoRA(rank=2, targets="q_proj", train=("lm_head",), init="default"), "b"
    )
    for adapter in (one, two):
        kit.stir(adapter)
    assert "lm_head" in {site.path for site in one.sites}
    assert not any("lm_head" in key for key in one.tensors)
    batch = kit.batch_of(model)
    copied = copy.deepcopy(model)
    with tt.rows(model, ["a", "b", None]), torch.no_grad():
        together = model(**batch).logits
    for row, name in enumerate(["a", "b", None]):
        with tt.using(model, name), torch.no_grad():
            kit.assert_close(model(**batch).logits[row], together[row], str(name))
    with torch.no_grad():  # a copy reads its own tensors
        for parameter in one.parameters():
            parameter.zero_()
        with tt.rows(copied, ["a", "b", None]):
            assert torch.equal(copied(**batch).logits, together)


@pytest.mark.parametrize("make", [tiny.bart, tiny.t5, tiny.gpt2])
def test_every_end_of_a_tied_weight_is_edited(make: kit.Make) -> None:
    """Encoder, decoder and head of an encoder-decoder share one embedding."""
    model = kit.loud(make)()
    adapter = tt.attach(model, tt.LoRA(rank=2, targets="input_embedding", tie=True), "a")
    kit.stir(adapter)
    assert len(adapter.sites) == (2 if make is tiny.gpt2 else 4) and len(adapter.tensors) == 2
    batch = {"input_ids": torch.arange(3, 12).view(3, 3)}
    if make is not tiny.gpt2:
        batch["decoder_input_ids"] = torch.arange(4, 10).view(3, 2)
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(
            tt.merge(model, "a")(**batch).logits, expected, atol=1e-4, rtol=1e-4
        )
        with tt.using(model, None):
            assert (model(**batch).logits - expected).abs().max() > 1e-2


def test_what_is_not_tied_is_said(tmp_path: Path) -> None:
    untied = kit.llama()
    with pytest.warns(UserWarning, match="nothing that is trained shares its weight"):
        ours.get_peft_model(
            untied, ours.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
        )
    wrong = {"embed_tokens": [3, 5], "lm_head": [3, 6]}
    with pytest.raises(ConfigError, match="names different tokens"):
        ours.get_peft_model(
            make(),
            ours.LoraConfig(
                target_modules=["q_proj"], trainable_token_indices=wrong, ensure_weight_tying=True
            ),
        )
    tied = make()
    tt.attach(tied, tt.LoRA(rank=2, targets="embed_tokens", tie=True), "a").save(tmp_path)
    with pytest.raises(AttachError, match="tie the weights first"):
        tt.attach(kit.llama(), tt.Adapter.load(tmp_path), any_base=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ensure_weight_tying"] is True
