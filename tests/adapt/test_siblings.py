"""Layers that read the same x: computed with the first of them, unless something is different this time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.adapt.test_lean import IDS, adapted, learned, same
from tests.tiny import CASES, output
from trimtab.adapt import fusing
from trimtab.adapt.bank import bank_of
from trimtab.adapt.site import LayerSite


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each operation computed."""
    found: list[int] = []
    plain = fusing.changed_linear

    def noted(x: Tensor, *layers: Any, **named: Any) -> Any:
        found.append(len(layers))
        return plain(x, *layers, **named)

    monkeypatch.setattr(fusing, "changed_linear", noted)
    return found


def gradients(model: nn.Module, forward: Callable[..., Any] | None = None) -> list[Tensor]:
    call = forward or (lambda ids: model(input_ids=ids).logits)
    call(IDS).float().logsumexp(-1).sum().backward()
    return learned(model)


def alone(model: nn.Module) -> nn.Module:
    """A copy whose layers are computed one by one."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, LayerSite):
            module.siblings = ()
    return made


def blocks(model: nn.Module) -> Any:
    return model.model.layers


def test_queries_keys_values_and_the_halves_of_an_mlp(counts: list[int]) -> None:
    model = adapted()
    ours = gradients(model)
    assert sorted(set(counts)) == [1, 2, 3]
    assert counts.count(3) == counts.count(2) == len(blocks(model))
    counts.clear()
    same(gradients(alone(model)), ours)
    assert set(counts) == {1}


@pytest.mark.parametrize("family", ["bert", "vit", "t5"])
def test_other_families_agree(family: str) -> None:
    model, inputs = CASES[family].model().train(), CASES[family].inputs()
    tt.attach(model, tt.LoRA(rank=2), "a")
    found = []
    for each in (model, alone(model)):
        torch.manual_seed(0)
        output(each, inputs).tanh().sum().backward()
        found.append(learned(each))
    same(*found)


def test_attention_to_another_stack_computes_nothing_early(counts: list[int]) -> None:
    model, inputs = CASES["t5"].model().train(), CASES["t5"].inputs()
    tt.attach(model, tt.LoRA(rank=2, targets=["**.EncDecAttention.*"]), "a")
    output(model, inputs).sum().backward()
    assert set(counts) == {1}


def test_those_that_have_an_adapter(counts: list[int]) -> None:
    model = CASES["llama"].model().train()
    tt.attach(model, tt.LoRA(rank=2, targets=["q_proj", "v_proj", "up_proj"]), "a")
    gradients(model)
    assert counts == [2, 1] * len(blocks(model))


def test_dropout_is_drawn_layer_by_layer(counts: list[int]) -> None:
    model = CASES["llama"].model().train()
    tt.attach(model, tt.LoRA(rank=2, dropout=0.1), "a")
    gradients(model)
    assert set(counts) == {1}


def test_a_layer_that_is_called_with_anything_else(counts: list[int]) -> None:
    model = adapted()
    attention = blocks(model)[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    other = alone(model)
    same(gradients(other), gradients(model))
    # one that is told of it too late: what was computed is left
    model = adapted()
    attention, plain = blocks(model)[0].self_attn, LayerSite.forward

    def doubled(self: LayerSite, x: Tensor) -> Any:
        return plain(self, x * 2 if self is attention.k_proj else x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerSite, "forward", doubled)
        first = gradients(model)
        same(gradients(model), first)
        same(first, gradients(other))
    assert not bank_of(model).early


def test_a_layer_that_is_written_into_before_the_next_is_called() -> None:
    model = adapted()
    attention = blocks(model)[0].self_attn
    with torch.no_grad():
        x = torch.randn(2, 40, attention.q_proj.in_features)
    bank = bank_of(model)
    context = bank._context = bank.context(training=True)
    try:
        with torch.no_grad():
            attention.q_proj(x)
            x.mul_(3)
            assert context is not None
            want = blocks(alone(model))[0].self_attn.k_proj(x)
            assert torch.allclose(attention.k_proj(x), want, atol=1e-5)
    finally:
        bank._context = None
        bank.close()
    assert not bank.early


def test_recomputed_blocks() -> None:
    model = adapted()
    want = gradients(model)
    for reentrant in (True, False):
        other = copy.deepcopy(model)
        other.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        if reentrant:
            other.enable_input_require_grads()  # type: ignore[operator]
        same(want, gradients(other))
        assert not bank_of(other).early


def test_nothing_is_left_when_an_adapter_goes() -> None:
    model = adapted()
    tt.attach(model, tt.LoRA(rank=2, targets=["q_proj"]), "b")
    query = blocks(model)[0].self_attn.q_proj
    assert len(query.siblings) == 2
    tt.detach(model, "a")
    assert query.siblings == ()
    assert not any(isinstance(module, LayerSite) for module in blocks(model)[0].mlp.modules())


def test_rows_of_several_adapters_and_two_at_once() -> None:
    model = adapted()
    tt.attach(model, tt.LoRA(rank=3), "b")
    other = alone(model)
    for names in (["a", "b"], ["a", None]):
        found = []
        for each in (model, other):
            with tt.rows(each, names):
                found.append(gradients(each))
        same(*found)
    found = []
    for each in (model, other):
        with tt.using(each, ("a", "b")):
            found.append(gradients(each))
    same(*found)
