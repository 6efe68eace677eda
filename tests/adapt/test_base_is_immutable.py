"""The base is never written: not by training, not by merging, not by batch norms, in any storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

import trimtab as tt
from tests import tiny as models
from tests.laws.cells import shaken
from tests.tiny import CASES, output
from trimtab.adapt.probe import bare_state

IDS = torch.arange(3, 19).reshape(2, 8)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base, copied."""
    return {name: tensor.clone() for name, tensor in bare_state(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return output(model, {"input_ids": IDS})


# -- modes and flags ----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A linear layer between two batch norms, of which a user may have stopped one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 6)
        self.second = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.linear(self.first(x)))


def test_running_statistics_stay_in_training_mode() -> None:
    model, x = Normed(), torch.randn(8, 6)
    with torch.no_grad():
        for _ in range(3):
            model(x + 1)
    before, expected = state(model), model.eval()(x)
    model.train()
    tt.attach(model, "lora(rank=2, targets='linear')", "a")
    for _ in range(3):
        y = model(x)
        y.sum().backward()
    assert same(state(model), before)
    assert torch.equal(y, expected)  # the statistics that it was trained with, as at evaluation


def test_batch_norms_are_as_they_were_after_detach() -> None:
    model, x = Normed(), torch.randn(8, 6)
    model.second.eval()
    tt.attach(model, "lora(rank=2, targets='linear')", "a")
    model(x)
    tt.detach(model, "a")
    assert model.first.training and not model.second.training
    tt.attach(model.eval(), "lora(rank=2, targets='linear')", "a")
    model.train()
    model(x)
    model.eval()
    tt.detach(model, "a")
    assert not model.first.training


def test_attaching_changes_no_mode() -> None:
    """S19: PEFT puts the whole model into evaluation."""
    model = models.llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    adapter = tt.attach(model, "bottleneck(size=2)", "a").detached(name="b")
    tt.attach(model, adapter)
    now = {name: module.training for name, module in model.named_modules()}
    assert {name: now[name] for name in before if name in now} == {
        name: mode for name, mode in before.items() if name in now
    }
    for name in "ab":
        tt.detach(model, name)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_who_acts_and_who_learns_are_separate() -> None:
    """S20: PEFT makes an adapter trainable by activating it."""
    model = models.llama()
    frozen = tt.attach(model, "lora(rank=2)", "frozen", trainable=False)
    learning = tt.attach(model, "lora(rank=2)", "learning")
    for name in ("frozen", "learning"):
        tt.disable(model, name)
        tt.enable(model, name)
        tt.stack(model, [name])
        with tt.using(model, name):
            logits(model)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in learning.parameters())


def test_disabled_is_the_base_when_biases_are_trained() -> None:
    """S21: PEFT trains the biases of the base itself."""
    model = models.bert()
    before, expected = state(model), logits(model)
    shaken(tt.attach(model, "lora(rank=2, bias='all', train=['classifier'])", "a"))
    assert not torch.allclose(logits(model), expected)
    with tt.using(model, None):
        assert torch.equal(logits(model), expected)
    assert same(state(model), before)


# -- merging ------------------------------------------------------------------------------------------


def test_merging_never_writes() -> None:
    """S15: ten merges in place change half of PEFT's base in bf16."""
    model = models.llama().bfloat16()
    shaken(tt.attach(model, "lora(rank=2)", "a"))
    before, expected = state(model), logits(model)
    merged = [tt.merge(model, "a") for _ in range(5)]
    assert same(state(model), before) and torch.equal(logits(model), expected)
    assert all(same(state(merged[0]), state(other)) for other in merged[1:])


def test_a_merged_model_shares_no_memory() -> None:
    model = models.llama()
    shaken(tt.attach(model, "lora(rank=2, targets='q_proj')", "a"))
    before = state(model)
    with torch.no_grad():
        for tensor in tt.merge(model, "a").state_dict().values():
            tensor.zero_()
    assert same(state(model), before)


def test_merging_takes_the_named_adapter_whole_whatever_acts_now() -> None:
    """S16: PEFT merges the factors of one and the trained module of the other."""
    model = models.llama_classifier()
    shaken(tt.attach(model, "lora(rank=2, train=['score'])", "a"))
    shaken(tt.attach(model, "lora(rank=2)", "b"), seed=2)
    tt.stack(model, ["b"])
    for name in "ab":
        with tt.using(model, name):
            expected = logits(model)
        assert torch.allclose(logits(tt.merge(model, name)), expected, atol=1e-5), name


@pytest.mark.parametrize("method", ["lora(rank=2)", "dora(rank=2)", "ia3", "bitfit"])
def test_bf16_bases_have_fp32_adapters_and_merge_within_rounding(method: str) -> None:
    model = models.llama().bfloat16()
    adapter = shaken(tt.attach(model, method, "a"), 0.1)
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    out = logits(model)
    assert out.dtype == torch.bfloat16
    merged = tt.merge(model, "a")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    exact = models.llama().bfloat16().float()
    tt.attach(exact, adapter.detached(), any_base=True)
    exact_out = logits(exact)
    error = (logits(merged) - exact_out).abs().max()
    assert error <= 1.5 * (out - exact_out).abs().max() + 2**-8 * exact_out.abs().max()


# -- tied weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("method", ["lora(rank=2, targets='{}')", "full(targets='{}')"])
def test_merging_unties(method: str, target: str, tmp_path: Path) -> None:
    """S14."""
    model = models.llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shaken(tt.attach(model, method.format(target), "a"))
    before, expected = state(model), logits(model)
    merged: Any = tt.merge(model, "a")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert same(state(model), before) and model.config.tie_word_embeddings
    assert not merged.config.tie_word_embeddings
    other = {"lm_head": merged.model.embed_tokens, "embed_tokens": merged.lm_head}[target]
    assert torch.equal(other.weight, before["model.embed_tokens.weight"])
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    merged.tie_weights()
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_merging_elsewhere_leaves_tied_weights_tied() -> None:
    model = models.llama(tie_word_embeddings=True)
    shaken(tt.attach(model, "lora(rank=2)", "a"))
    merged: Any = tt.merge(model, "a")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


def test_merging_both_of_two_tied_layers_unties_them(tmp_path: Path) -> None:
    model = models.gpt2()
    shaken(tt.attach(model, "lora(rank=2, targets=['lm_head', 'wte'])", "a"))
    expected = logits(model)
    merged: Any = tt.merge(model, "a")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_merging_full_training_of_all_keeps_tied_weights_tied(tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    shaken(tt.attach(model, "full(targets='all')", "a"))
    expected = logits(model)
    merged: Any = tt.merge(model, "a")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "bert"])
def test_full_training_of_all_merges_and_saves_where_weights_are_tied(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model = case.make()
    before = state(model)
    shaken(tt.attach(model, "full(targets='all')", "a"))
    expected = output(model, case.inputs())
    merged: Any = tt.merge(model, "a")
    assert torch.allclose(output(merged, case.inputs()), expected, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).to(expected.dtype).eval()
    assert torch.allclose(output(loaded, case.inputs()), expected, atol=1e-5)
    tt.detach(model, "a")
    assert same(state(model), before)


@pytest.mark.parametrize("target", ["lm_head", "encoder.embed_tokens"])
def test_merging_unties_an_encoder_decoder(target: str, tmp_path: Path) -> None:
    """T5 scales its decoder's output where the head is tied, and must go on doing so."""
    case = CASES["t5"]
    model = case.make()
    shaken(tt.attach(model, f"lora(rank=2, targets='{target}')", "a"))
    expected = output(model, case.inputs())
    merged: Any = tt.merge(model, "a")
    assert torch.allclose(output(merged, case.inputs()), expected, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.allclose(output(loaded, case.inputs()), expected, atol=1e-4)


# -- storage that hides the weight --------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer as a quantiser leaves it: codes of eight bits, a scale per row, and a forward."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("row_scale", scale)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.codes.to(x.dtype) * self.row_scale.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


def quantised() -> nn.Module:
    """A tiny Llama whose linear layers in the blocks hide their weights."""
    model = models.llama(num_hidden_layers=2, attention_bias=True)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    return model


@pytest.mark.parametrize(
    "method", ["lora(rank=2)", "dora(rank=2)", "ia3", "bitfit", "lora(rank=2, bias='lora_only')"]
)
def test_a_hidden_weight_is_adapted_and_merged_by_pushing_the_identity(method: str) -> None:
    model = quantised()
    base = logits(model)
    shaken(tt.attach(model, method, "a"))
    before, expected = state(model), logits(model)
    assert not torch.allclose(expected, base, atol=1e-3)
    with tt.using(model, None):
        assert torch.equal(logits(model), base)
    merged: Any = tt.merge(model, "a")
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert isinstance(merged.model.layers[0].self_attn.k_proj, nn.Linear)
    assert same(state(model), before)


def test_the_same_weights_in_another_storage_are_the_same_base(tmp_path: Path) -> None:
    dense = models.llama(num_hidden_layers=2, attention_bias=True)
    shaken(tt.attach(dense, "lora(rank=2)", "a")).save(tmp_path / "a")
    model = quantised()
    tt.attach(model, tt.Adapter.load(tmp_path / "a"))
    assert torch.allclose(logits(model), logits(dense), atol=0.05)


def test_gradients_flow_through_a_hidden_weight() -> None:
    model = quantised()
    adapter = shaken(tt.attach(model, "lora(rank=2)", "a"))
    before = state(model)
    model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert same(state(model), before)
