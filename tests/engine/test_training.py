"""forward_backward and optim_step: what gradients are, however the data are laid out."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine import kit
from trimtab.adapt.acting import using
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import Method
from trimtab.data import Datum
from trimtab.engine import Engine, head
from trimtab.errors import (
    DataError,
    NonFiniteLossError,
    RouteError,
    TrainingError,
    UnknownNameError,
    UnsupportedError,
)
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import Prefix
from trimtab.methods.spottune import SpotTune
from trimtab.optim import AdamParams
from trimtab.optim.params import CrossEntropy

STEP = AdamParams(lr=1e-2)


def grads(
    method: Method | str, data: list[Datum], *, micro: int = 4096, packed: bool | None = None
) -> list[Tensor]:
    """The adapter's gradients, in fp64, as sums."""
    base = kit.base(kit.llama())
    adapter = attach(base.model, method, "a")
    base.model.double()
    with torch.no_grad():
        for n, p in enumerate(adapter.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)).double() * 0.1)
    engine = Engine(base, micro_tokens=micro, packed=packed)
    engine.forward_backward(data, "a")
    return kit.gradients(list(adapter.parameters()))


@pytest.mark.parametrize("method", [LoRA(rank=2), "ia3", "bottleneck(size=4)", Prefix(length=3)])
def test_gradients_do_not_depend_on_the_layout(method: Method) -> None:
    data = kit.datums()
    want = grads(method, data, packed=False)
    assert any(float(g.abs().max()) > 1e-3 for g in want)
    for micro, packed in ((40, False), (40, True), (70, True), (4096, True), (64, None)):
        got = grads(method, data, micro=micro, packed=packed)
        for one, other in zip(want, got, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def test_gradients_are_sums_over_calls() -> None:
    data = kit.datums()
    base = kit.base()
    adapter = attach(base.model, LoRA(rank=2), "a")
    engine = Engine(base)
    engine.forward_backward(data, "a")
    whole = kit.gradients(list(adapter.parameters()))
    weight = engine.optim_step("a", AdamParams(lr=1e-12)).weight
    for datum in data:
        engine.forward_backward([datum], "a")
    for one, other in zip(whole, kit.gradients(list(adapter.parameters())), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert engine.optim_step("a", STEP).weight == pytest.approx(weight)
    assert weight == sum(sum(datum.weights) for datum in data)


def test_losses_equal_the_models_own() -> None:
    data = kit.datums()
    base = kit.base()
    engine = Engine(base)
    result = engine.forward(data)
    for datum, found, weight in zip(data, result.sums, result.weights, strict=True):
        logits = base.model(input_ids=torch.tensor([datum.tokens])).logits[0].double()
        picked = logits.log_softmax(-1)[range(len(datum)), list(datum.targets)]
        want = -(picked * torch.tensor(datum.weights, dtype=torch.float64)).sum()
        assert found == pytest.approx(float(want), rel=1e-5)
        assert weight == sum(datum.weights)
    assert 0 <= result.accuracy <= 1
    assert result.mean == pytest.approx(result.total / result.weight)


def test_two_owners_in_one_call_train_as_alone() -> None:
    data = kit.datums(8)
    owners = ["a", "b", "a", "a", "b", "b", "a", "b"]

    def run(together: bool) -> list[Tensor]:
        base = kit.base()
        first = attach(base.model, LoRA(rank=2), "a", seed=1)
        second = attach(base.model, "ia3", "b")
        engine = Engine(base)
        for _ in range(3):
            if together:
                engine.forward_backward(data, owners)
            else:
                for name in "ab":
                    chosen = [d for d, owner in zip(data, owners, strict=True) if owner == name]
                    engine.forward_backward(chosen, name)
            for name in "ab":
                engine.optim_step(name, STEP)
        return [p.detach().clone() for p in (*first.parameters(), *second.parameters())]

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_is_kept_for_a_detached_adapter_is_given_back() -> None:
    data = kit.datums()
    base = kit.base()
    engine = Engine(base)
    for name in ("a", "b"):
        attach(base.model, LoRA(rank=2), name)
    engine.forward_backward(data[:2], ["a", "b"])
    for name in ("a", "b"):
        engine.optim_step(name, STEP)
    kept = {
        name: [weakref.ref(tensor) for tensor in engine.optimiser_tensors(name)] for name in "ab"
    }
    detach(base.model, "a")
    engine.forget("a")
    gc.collect()
    assert kept["a"] and all(moment() is None for moment in kept["a"])
    assert kept["b"] and all(moment() is not None for moment in kept["b"])


def test_an_encoder_trains_on_padded_rows() -> None:
    base = kit.base(kit.bert())
    attach(base.model, LoRA(rank=2, targets="all-linear"), "a")
    engine = Engine(base)
    data = kit.datums(5)
    alone = [engine.forward([datum], "a").total for datum in data]
    assert list(engine.forward(data, "a").sums) == pytest.approx(alone, rel=1e-5)
    before = engine.forward(data, "a").mean
    for _ in range(15):
        engine.forward_backward(data, "a")
        engine.optim_step("a", STEP)
    assert engine.forward(data, "a").mean < before - 0.1


def test_a_gate_sees_the_prompt_only_and_its_losses_count_once() -> None:
    base = kit.base()
    attach(base.model, SpotTune(inner="lora(rank=2)", blocks=1), "a")
    for packed in (False, True):
        engine = Engine(base, packed=packed)
        result = engine.forward_backward(kit.datums(), "a")
        assert set(result.auxiliary) == {"a.blocks", "a.entropy"}
        engine.optim_step("a", STEP)
    data = kit.datums()
    rows, packs = (Engine(base, packed=packed).forward(data, "a").sums for packed in (False, True))
    assert list(rows) == pytest.approx(list(packs), rel=1e-4)


def test_an_adapter_on_the_head_trains_without_full_logits() -> None:
    base = kit.base()
    adapter = attach(base.model, LoRA(rank=2, targets=("q_proj", "lm_head")), "a")
    engine = Engine(base)
    data = kit.datums()
    before = engine.forward(data, "a").mean
    plain = engine.forward(data).mean
    assert engine._head._plain is not None
    logits = base.model(input_ids=torch.tensor([data[0].tokens])).logits[0].double()
    picked = logits.log_softmax(-1)[range(len(data[0])), list(data[0].targets)]
    want = -(picked * torch.tensor(data[0].weights, dtype=torch.float64)).sum()
    assert engine.forward(data[:1], "a").total == pytest.approx(float(want.detach()), rel=1e-5)
    for _ in range(10):
        engine.forward_backward(data, "a")
        engine.optim_step("a", STEP)
    assert engine.forward(data, "a").mean < before - 0.1
    assert engine.forward(data).mean == plain
    assert all(float(p.detach().abs().max()) > 0 for p in adapter.parameters())


def _gemma2() -> PreTrainedModel:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=kit.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config).eval()


def _named() -> PreTrainedModel:
    """A model whose config names a cap that it does not know."""
    model = kit.llama()
    model.config.final_logit_softcapping = 2.0
    return model


@pytest.mark.parametrize(("model", "caps"), [(_gemma2, [2.0]), (_named, []), (kit.llama, [None])])
def test_a_soft_cap_is_known_and_verified(
    model: Callable[[], PreTrainedModel], caps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = kit.base(model())
    engine = Engine(base)
    chunked: list[float | None] = []
    linear = head.linear_cross_entropy
    monkeypatch.setattr(
        head, "linear_cross_entropy", lambda *given: chunked.append(given[-1].cap) or linear(*given)
    )
    datum = kit.datums(1)[0]
    logits = base.model(input_ids=torch.tensor([datum.tokens])).logits[0].double()
    picked = logits.log_softmax(-1)[range(len(datum)), list(datum.targets)]
    want = -(picked * torch.tensor(datum.weights, dtype=torch.float64)).sum()
    assert engine.forward([datum]).total == pytest.approx(float(want), rel=1e-5)
    assert chunked == caps


def test_a_soft_cap_holds_with_an_adapter_on_the_head() -> None:
    base = kit.base(_gemma2())
    adapter = attach(base.model, LoRA(rank=2, targets=["lm_head"]), "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1
    datum = kit.datums(1)[0]
    with using(base.model, "a"):
        logits = base.model(input_ids=torch.tensor([datum.tokens])).logits[0]
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(datum.targets), reduction="none")
    want = float((each.detach() * torch.tensor(datum.weights)).sum())
    assert Engine(base).forward([datum], "a").total == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("aim", [CrossEntropy(label_smoothing=0.2), CrossEntropy(z_loss=0.01)])
@pytest.mark.parametrize("model", [kit.llama, kit.bert])
def test_other_forms_of_the_loss_are_learnt_and_the_likelihood_is_told(
    aim: CrossEntropy, model: Any
) -> None:
    base = kit.base(model())
    adapter = attach(base.model, LoRA(rank=2), "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05
    engine, (datum,) = Engine(base), kit.datums(1)
    told = engine.forward_backward([datum], "a", aim)
    assert told.total == pytest.approx(engine.forward([datum], "a").total, rel=1e-5)
    found = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    base.model.zero_grad()
    with using(base.model, "a"):
        logits = base.model(input_ids=torch.tensor([datum.tokens])).logits[0]
    targets = torch.tensor(datum.targets)
    each = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", label_smoothing=aim.label_smoothing
    )
    each = each + aim.z_loss * logits.logsumexp(-1) ** 2
    (each * torch.tensor(datum.weights)).sum().backward()
    for parameter, gradient in zip(adapter.parameters(), found, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_examples() -> None:
    base = kit.base()
    adapter = attach(base.model, LoRA(rank=2), "a")
    engine = Engine(base, micro_tokens=40, packed=False)
    data = kit.datums()
    engine.forward_backward(data, "a")
    engine.optim_step("a", STEP)
    before = [p.detach().clone() for p in adapter.parameters()]
    token = data[4].tokens[-1]
    with torch.no_grad():
        base.model.model.embed_tokens.weight[token] = math.nan
    bad = [datum.origin for datum in data if token in datum.tokens]
    with pytest.raises(NonFiniteLossError, match=bad[-1]):
        engine.forward_backward(data, "a")
    assert all(torch.equal(p, b) for p, b in zip(adapter.parameters(), before, strict=True))
    assert all(p.grad is None for p in adapter.parameters())
    with pytest.raises(TrainingError, match="no gradients"):
        engine.optim_step("a", STEP)


def test_bad_calls() -> None:
    base = kit.base(kit.llama(positions=16))
    attach(base.model, Prefix(length=3), "a")
    engine = Engine(base)
    long = Datum.causal(list(range(15)), [1.0] * 15, origin="f:1")
    assert engine.context() == 16
    assert engine.context("a") == 13
    engine.forward([long])
    with pytest.raises(DataError, match=r"f:1: 14 tokens, more than the model's context of 13"):
        engine.forward_backward([long], "a")
    with pytest.raises(DataError, match="no examples"):
        engine.forward_backward([], "a")
    for ids, weights in (([3, -1, 4], [1.0] * 3), ([3, 4, 400], [1.0] * 3)):
        with pytest.raises(DataError, match="f:2: there is no token .* 0 to 399"):
            engine.forward_backward([Datum.causal(ids, weights, origin="f:2")], "a")
    engine.forward([Datum((3, 4), (4, -100), (1.0, 0.0))])  # what is not learnt may be anything
    with pytest.raises(RouteError, match="2 adapters were named for 1"):
        engine.forward_backward([long], ["a", "a"])
    with pytest.raises(UnknownNameError, match="no adapter 'b'"):
        engine.forward_backward([long], "b")
    with pytest.raises(UnknownNameError, match="Did you mean 'cross_entropy'"):
        engine.forward_backward([long], "a", loss="crossentropy")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="no gradients"):
        engine.optim_step("a", STEP)


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        Engine(T5ForConditionalGeneration(config))


# -- state -----------------------------------------------------------------------------------------


def trained(engine: Engine, data: list[Datum], steps: int) -> None:
    for _ in range(steps):
        engine.forward_backward(data[:4], "a")
        engine.forward_backward(data[4:], "a")
        engine.optim_step("a", STEP)


@pytest.mark.parametrize("method", [LoRA(rank=2, dropout=0.2), SpotTune(inner="lora(rank=2)")])
def test_a_saved_state_continues_bitwise(method: Method, tmp_path: Path) -> None:
    data = kit.datums()
    base = kit.base()
    adapter = attach(base.model, method, "a")
    engine = Engine(base)
    torch.manual_seed(3)
    trained(engine, data, 2)
    engine.forward_backward(data[:3], "a")  # in the middle of a step
    engine.save("a", tmp_path / "state", {"cursor": [1, 2]})
    engine.forward_backward(data[3:], "a")
    engine.optim_step("a", STEP)
    trained(engine, data, 2)

    again = kit.base()
    other = Engine(again)
    torch.manual_seed(99)
    assert other.load(tmp_path / "state") == {"cursor": [1, 2]}
    other.forward_backward(data[3:], "a")
    other.optim_step("a", STEP)
    trained(other, data, 2)
    loaded = bank_of(other.model).require("a")
    assert loaded == adapter
    assert other.tenants.of(loaded).steps == 5
