"""Sequence classifiers in the engine: transformers' own loss, a plain loop's trajectory, mixed owners, resume."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.engine import kit
from trimtab.adapt.acting import using
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach
from trimtab.adapt.bank import bank_of
from trimtab.data import Datum
from trimtab.engine import Engine, LossResult
from trimtab.errors import DataError, ModelError, UnsupportedError
from trimtab.optim import AdamParams

Make = Callable[[], PreTrainedModel]
MODELS = pytest.mark.parametrize("make", [tiny.bert, tiny.llama_classifier], ids=["bert", "llama"])
LORA = "lora(rank=2, train=('head',))"
STEP = AdamParams(lr=1e-2, beta2=0.95, clip=None)


def model_of(make: Make) -> PreTrainedModel:
    return make().double().requires_grad_(False)


def texts(count: int = 7, *, seed: int = 0) -> list[Datum]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = [draw.randrange(3, tiny.VOCABULARY) for _ in range(draw.randrange(3, 12))]
        made.append(Datum.classified(ids, draw.randrange(3), origin=f"made.jsonl:{number + 1}"))
    return made


def padded(data: list[Datum]) -> dict[str, Tensor]:
    width = max(map(len, data))
    rows = [[*datum.tokens, *[0] * (width - len(datum))] for datum in data]
    seen = [[1] * len(datum) + [0] * (width - len(datum)) for datum in data]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(seen),
        "labels": torch.tensor([datum.targets[-1] for datum in data]),
    }


def moved(model: PreTrainedModel, method: str, name: str) -> Adapter:
    """An adapter in fp64 (the norms of Llama stay in fp32), no longer at its identity."""
    adapter = attach(model, method, name)
    model.double()
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            draw = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=draw).double() * 0.1)
    return adapter


@MODELS
def test_loss_and_gradients_are_the_models_own(make: Make) -> None:
    model, data = model_of(make), texts()
    adapter = moved(model, LORA, "a")
    with using(model, "a"):
        model(**padded(data)).loss.backward()
    want = kit.gradients(list(adapter.parameters()))
    for parameter in adapter.parameters():
        parameter.grad = None
    assert any(key.endswith("modules_to_save.weight") for key in adapter.tensors)
    for micro in (4096, 16):
        engine = Engine(model, micro_tokens=micro)
        result = engine.forward_backward(data, "a")
        assert result.weights == [1.0] * len(data)
        with using(model, "a"), torch.no_grad():
            mean = float(model(**padded(data)).loss)
        assert result.mean == pytest.approx(mean, rel=1e-9)
        got = kit.gradients(list(adapter.parameters()))
        for one, other in zip(want, got, strict=True):  # theirs is a mean, ours a sum
            torch.testing.assert_close(other / len(data), one, rtol=1e-5, atol=1e-7)
        engine._tenant("a").discard()


@MODELS
def test_the_trajectory_is_a_plain_loops(make: Make) -> None:
    data = texts(12)

    def ours() -> list[Tensor]:
        model = model_of(make)
        adapter, engine = moved(model, LORA, "a"), Engine(model)
        for start in range(0, 12, 3):
            engine.forward_backward(data[start : start + 3], "a")
            engine.optim_step("a", STEP)
        return [p.detach() for p in adapter.parameters()]

    def plain() -> list[Tensor]:
        model = model_of(make)
        adapter = moved(model, LORA, "a")
        optimiser = torch.optim.AdamW(
            adapter.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0
        )
        for start in range(0, 12, 3):
            model(**padded(data[start : start + 3])).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return [p.detach() for p in adapter.parameters()]

    for one, other in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@MODELS
def test_two_heads_in_one_batch_train_as_alone(make: Make) -> None:
    data = texts(8)
    owners = ["a", "b", "a", "a", "b", "b", "a", "b"]

    def run(together: bool) -> tuple[list[Tensor], list[list[float]]]:
        model = model_of(make)
        one = moved(model, LORA, "a")
        two = moved(model, "ia3(train=('head',))", "b")
        engine = Engine(model)
        for _ in range(3):
            if together:
                engine.forward_backward(data, owners)
            else:
                for name in "ab":
                    own = [d for d, owner in zip(data, owners, strict=True) if owner == name]
                    engine.forward_backward(own, name)
            for name in "ab":
                engine.optim_step(name, STEP)
        trained = [p.detach().clone() for p in (*one.parameters(), *two.parameters())]
        ids = [datum.tokens for datum in data]
        who = [*owners[:-1], None]
        if together:
            return trained, engine.classify(ids, who)
        return trained, [
            engine.classify([each], name)[0] for each, name in zip(ids, who, strict=True)
        ]

    (mixed, said), (alone, each) = run(True), run(False)
    for one, other in zip(mixed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(said), torch.tensor(each), rtol=1e-4, atol=1e-6)


@MODELS
def test_probabilities_agree_with_the_loss(make: Make) -> None:
    model, data = model_of(make), texts()
    moved(model, LORA, "a")
    engine = Engine(model)
    result: LossResult = engine.forward(data, "a")
    shares = torch.tensor(engine.classify([datum.tokens for datum in data], "a"))
    right = [datum.targets[-1] for datum in data]
    torch.testing.assert_close(shares.sum(1), torch.ones(len(data)))
    nll = -shares[range(len(data)), right].log()
    assert list(result.sums) == pytest.approx(nll.tolist(), rel=1e-5)
    assert result.hits == [float(a == b) for a, b in zip(shares.argmax(1), right, strict=True)]
    assert engine.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert engine.classify([]) == []


@MODELS
def test_a_saved_state_continues_bitwise(make: Make, tmp_path: Path) -> None:
    data = texts()

    def steps(engine: Engine, count: int) -> None:
        for _ in range(count):
            engine.forward_backward(data, "a")
            engine.optim_step("a", STEP)

    method = "lora(rank=2, dropout=0.2, train=('head',))"
    model = make().requires_grad_(False)
    adapter = attach(model, method, "a")
    engine = Engine(model)
    torch.manual_seed(3)
    steps(engine, 2)
    engine.forward_backward(data[:3], "a")  # in the middle of a step
    engine.save("a", tmp_path / "state")
    steps(engine, 2)

    other = Engine(make().requires_grad_(False))
    torch.manual_seed(99)
    other.load(tmp_path / "state")
    steps(other, 2)
    assert bank_of(other.model).require("a") == adapter


@MODELS
def test_it_learns_and_the_base_stays(make: Make) -> None:
    model, data = make().requires_grad_(False), texts(6)
    attach(model, LORA, "a")
    engine = Engine(model)
    before = engine.forward(data)
    for _ in range(30):
        engine.forward_backward(data, "a")
        engine.optim_step("a", STEP)
    assert engine.forward(data, "a").mean < 0.5 * before.mean
    assert engine.forward(data) == before


# -- what goes wrong -------------------------------------------------------------------------------


def test_what_a_classifier_cannot_learn() -> None:
    model = model_of(tiny.llama_classifier)
    attach(model, LORA, "a")
    engine = Engine(model)
    with pytest.raises(DataError, match=r"f:1: there is no class 3; the model has 3: LABEL_0"):
        engine.forward_backward([Datum.classified([5, 6], 3, origin="f:1")], "a")
    with pytest.raises(DataError, match="weights within its text"):
        engine.forward_backward([Datum.causal([5, 6, 1], [0.0, 1.0, 1.0])], "a")
    with pytest.raises(DataError, match=r"ends with the padding token \(0\)"):
        engine.forward_backward([Datum.classified([5, 0], 1)], "a")
    with pytest.raises(UnsupportedError, match="gives classes and no text"):
        engine.sample([[5, 6]])
    with pytest.raises(UnsupportedError, match="has no classes"):
        Engine(kit.base()).classify([[5, 6]])


def test_heads_that_are_not_trained_here() -> None:
    model = tiny.bert()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(UnsupportedError, match=r"3 labels \(multi_label_classification\)"):
        Engine(model)
    unpadded = tiny.llama_classifier()
    unpadded.config.pad_token_id = None
    with pytest.raises(ModelError, match="padding token"):
        Engine(unpadded)
