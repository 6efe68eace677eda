"""Attention in the engine: by documents without a mask, ours only inside, and the same loss and gradients."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engine import kit
from trimtab.adapt import attend
from trimtab.adapt.attach import attach
from trimtab.adapt.documents import Documents
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import Prefix
from trimtab.optim.params import Memory

METHODS = {"lora": LoRA(rank=2), "prefix": Prefix(length=3)}


def gradients(
    method: Any = METHODS["lora"],
    *,
    dtype: torch.dtype = torch.float64,
    told: bool = True,
    recompute: Any = "none",
    attention_dropout: float = 0.0,
    seed: int = 0,
) -> list[Tensor]:
    base = kit.base()
    for layer in base.model.model.layers:
        layer.self_attn.attention_dropout = attention_dropout
    adapter = attach(base.model, method, "a")
    base.model.to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    engine = Engine(base, packed=True, memory=Memory(recompute=recompute))
    assert engine._layout.apart
    if not told:
        engine._layout = replace(engine._layout, apart=False)
    torch.manual_seed(0)
    engine.forward_backward(kit.datums(seed=seed), "a")
    return kit.gradients(list(adapter.parameters()))


@pytest.mark.parametrize("recompute", ["none", "mlp", "blocks"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_are_those_under_a_mask(method: Any, recompute: str) -> None:
    for mine, other in zip(
        gradients(method, recompute=recompute), gradients(method, told=False), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("encoder", [False, True])
def test_no_mask_is_made(encoder: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was made")

    def never_told(self: Documents, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was made")

    model = tiny.bert() if encoder else kit.llama()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    attach(model, LoRA(rank=2), "a")
    engine = Engine(model, packed=None if encoder else True)
    monkeypatch.setattr(attend, "sdpa_mask", never)
    monkeypatch.setattr(Documents, "mask", never_told)
    data = kit.datums()
    if encoder:
        data = [Datum.classified([1 + t % 90 for t in datum.tokens], 0) for datum in data]
    engine.forward_backward(data, "a")


def test_dropout_inside_attention_is_the_same_when_blocks_are_recomputed() -> None:
    found = gradients(attention_dropout=0.1)
    again = gradients(attention_dropout=0.1, recompute="blocks")
    for mine, other in zip(found, again, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    plain = gradients()
    assert any(
        float((mine - other).abs().max()) > 1e-3 for mine, other in zip(found, plain, strict=True)
    )


def test_in_bf16_gradients_are_near_those_of_torchs_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On average over several data: the random model enlarges each rounding some hundred times."""

    def errors() -> float:
        found = []
        for seed in range(9):
            exact, near = (
                torch.cat([g.flatten() for g in gradients(dtype=dtype, seed=seed)]).double()
                for dtype in (torch.float64, torch.bfloat16)
            )
            found.append(float((near - exact).norm() / exact.norm()))
        return statistics.median(found)

    mine = errors()
    monkeypatch.setattr(attend, "_fits", lambda *args, **kwargs: False)
    theirs = errors()
    assert mine < 2 * theirs and theirs < 1


def test_the_model_is_called_as_before_afterwards() -> None:
    base = kit.base(kit.llama())
    attach(base.model, LoRA(rank=2), "a")
    engine = Engine(base)
    names = []
    layer = base.model.model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda *_: names.append(base.model.config._attn_implementation)
    )
    engine.forward_backward(kit.datums(), "a")
    hook.remove()
    assert set(names) == {"trimtab_sdpa"}
    assert base.model.config._attn_implementation == "sdpa"
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.forward_backward(kit.datums(), "a")
    hook.remove()
    assert base.model.config._attn_implementation == "sdpa"


def test_a_prefix_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    leads: list[int] = []
    plain = attend.blocked_attention

    def noted(*given: Any, lead: int, **named: Any) -> Tensor:
        leads.append(lead)
        return plain(*given, lead=lead, **named)

    monkeypatch.setattr(attend, "blocked_attention", noted)
    monkeypatch.setattr(attend, "_own_mask", None)  # nobody asks for it
    gradients(METHODS["prefix"], dtype=torch.bfloat16)
    assert 3 in leads  # and none where the engine looks at the bare base
    base = kit.base()
    attach(base.model, METHODS["prefix"], "a")
    leads.clear()
    base.model(input_ids=torch.arange(40).view(2, 20))
    assert set(leads) == {3}
