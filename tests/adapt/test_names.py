"""Names inside and outside: parameters are named as PEFT names them, the base keeps its own names."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trimtab as tt
from tests import tiny as models
from tests.laws.cells import shaken
from tests.tiny import output

IDS = torch.arange(3, 19).reshape(2, 8)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return output(model, {"input_ids": IDS})


# -- as PEFT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            tt.LoRA(rank=2, targets=("q_proj", "embed_tokens")),
            peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        ),
        (
            tt.DoRA(rank=2, targets="q_proj"),
            peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        ),
        (
            tt.IA3(targets="k_proj", feedforward="down_proj"),
            peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
        ),
        (
            tt.LoRA(rank=2, targets="q_proj", train=("lm_head",)),
            peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        ),
    ],
    ids=["lora", "dora", "ia3", "trained-head"],
)
def test_parameters_have_the_names_that_peft_gives_them(
    ours: tt.Method, theirs: peft.PeftConfig
) -> None:
    model = models.llama()
    tt.attach(model, ours, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(models.llama(), theirs)
    expected = {
        name.removeprefix("base_model.model."): tuple(p.shape)
        for name, p in other.named_parameters()
        if p.requires_grad
    }
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert found == expected
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == _frozen(other)


def _frozen(model: nn.Module) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


def test_the_wrapped_layer_looks_like_itself() -> None:
    model = models.llama()
    plain = model.model.layers[0].self_attn.q_proj
    tt.attach(model, "lora(rank=2)", "a")
    site = model.model.layers[0].self_attn.q_proj
    assert site.base_layer is plain
    assert site.weight is plain.weight and site.in_features == 32
    assert model.get_parameter("model.layers.0.self_attn.q_proj.base_layer.weight") is plain.weight
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = site.nonsense


# -- state dicts ----------------------------------------------------------------------------------------


def test_a_state_dict_has_the_names_of_the_base_and_those_of_the_adapters() -> None:
    model = models.llama()
    names = list(model.state_dict())
    tt.attach(model, "lora(rank=2, targets='q_proj')", "a")
    tt.attach(model, "prefix(length=2)", "b")
    now = model.state_dict()
    assert [name for name in now if name in names] == names
    assert set(now) - set(names) == {
        *(f"model.layers.{n}.self_attn.q_proj.lora_{x}.a.weight" for n in range(3) for x in "AB"),
        "trimtab.prompt_encoder.b.embedding.weight",
    }
    assert model.model.layers[0].self_attn.state_dict().keys() >= {"q_proj.weight", "k_proj.weight"}
    assert model.model.layers[0].self_attn.q_proj.state_dict().keys() == {
        "weight", "lora_A.a.weight", "lora_B.a.weight"
    }  # fmt: skip


def test_a_state_dict_that_lacks_or_has_keys_is_refused() -> None:
    model = models.llama()
    tt.attach(model, "lora(rank=2, targets='q_proj')", "a")
    whole = model.state_dict()
    for change in (
        {k: v for k, v in whole.items() if k != "model.layers.1.self_attn.q_proj.weight"},
        {k: v for k, v in whole.items() if k != "model.layers.1.self_attn.q_proj.lora_A.a.weight"},
        {**whole, "model.layers.1.self_attn.q_proj.lora_C.a.weight": torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj"):
            model.load_state_dict(change)


def test_torch_save_of_a_state_dict_and_of_a_model() -> None:
    model = models.llama()
    shaken(tt.attach(model, "lora(rank=2)", "a"))
    shaken(tt.attach(model, "bottleneck(size=2)", "b"))
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = models.llama()
    for method, name in (("lora(rank=2)", "a"), ("bottleneck(size=2)", "b")):
        tt.attach(fresh, method, name)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(fresh), expected)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    again = torch.load(whole, weights_only=False)
    assert torch.equal(logits(again), expected)
    tt.detach(again, "b")
    with tt.using(model, "a"):
        assert torch.equal(logits(again), logits(model))


def test_moving_and_casting_keep_adapters_in_step() -> None:
    model = models.llama()
    adapter = shaken(tt.attach(model, "lora(rank=2)", "a"))
    model.double()
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float64}
    assert logits(model).dtype == torch.float64
    model.to("meta")
    assert {tensor.device.type for tensor in adapter.tensors.values()} == {"meta"}


# -- with transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["lora(rank=2, targets='lm_head')", "lora(rank=2, targets='embed_tokens')"]
)
def test_tying_again_reaches_the_wrapped_weight(method: str) -> None:
    model: Any = models.llama(tie_word_embeddings=True)
    shaken(tt.attach(model, method, "a"))
    expected = logits(model)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)
    tt.detach(model, "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize(
    "make", [models.llama, models.gpt2, models.mixtral], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("method", ["lora(rank=2)", "prefix(length=2)"])
def test_a_saved_model_reloads_as_the_base(make: Any, method: str, tmp_path: Path) -> None:
    """``save_pretrained`` of a model with adapters, and after they are gone."""
    model = make()
    expected = logits(model)
    base = set(model.state_dict())
    model.save_pretrained(tmp_path / "bare")
    adapter = shaken(tt.attach(model, method, "a"))
    adapted = logits(model)
    model.save_pretrained(tmp_path / "attached")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert torch.allclose(logits(loaded), expected, atol=1e-6)
    assert set(loaded.state_dict()) == base
    bare = load_file(tmp_path / "bare" / "model.safetensors")
    attached = load_file(tmp_path / "attached" / "model.safetensors")
    assert all(torch.equal(attached[key], tensor) for key, tensor in bare.items())
    if make is not models.mixtral:  # transformers writes whatever lies below experts one by one
        assert len(attached) == len(bare) + len(adapter.tensors)
    assert "trimtab" not in (tmp_path / "attached" / "config.json").read_text()
    tt.attach(loaded, adapter.detached())
    assert torch.allclose(logits(loaded), adapted, atol=1e-5)
    tt.detach(model, "a")
    model.save_pretrained(tmp_path / "detached")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("bare", "detached")]
    assert files[0] == files[1]


def test_only_the_adapter_is_saved_by_the_adapter(tmp_path: Path) -> None:
    """Bytes on disk are the bytes of the trained tensors."""
    model = models.llama()
    adapter = tt.attach(model, "lora(rank=2, train=['lm_head'])", "a")
    adapter.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == adapter.nbytes
    assert adapter.nbytes == 4 * adapter.count
