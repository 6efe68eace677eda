"""Losses of every kind, against plain autograd over all logits; and those of several adapters in one call."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine import kit
from trimtab.adapt.acting import using
from trimtab.adapt.attach import attach
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.engine.aims import Aim
from trimtab.errors import ConfigError, DataError, UnknownNameError
from trimtab.losses import CISPO, DPO, PPO, Custom, Document, ImportanceSampling
from trimtab.optim import AdamParams, CrossEntropy

Logp = Sequence[Tensor]


def given(count: int = 4, seed: int = 0) -> list[Datum]:
    """Answers with what their tokens had when they were drawn, near what the tiny model gives them."""
    draw = random.Random(seed)
    return [
        replace(
            datum,
            logprobs=tuple(draw.gauss(-6, 1) for _ in datum.tokens),
            advantages=tuple(draw.gauss(0, 1) for _ in datum.tokens),
        )
        for datum in kit.datums(count, seed=seed)
    ]


def an_engine(*, micro: int = 4096, packed: bool | None = None) -> Engine:
    """In fp64, with three adapters that do something."""
    base = kit.base()
    for number, method in enumerate(("lora(rank=2)", "ia3", "lora(rank=3, targets='all-linear')")):
        adapter = attach(base.model, method, "abc"[number])
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    base.model.double()
    return Engine(base, micro_tokens=micro, packed=packed)


def trained(engine: Engine, name: str) -> list[torch.nn.Parameter]:
    return list(engine._tenant(name).adapter.parameters())


def all_logits(engine: Engine, data: Sequence[Datum], name: str | None) -> list[Tensor]:
    """log p of each target."""
    found = []
    for datum in data:
        with using(engine.model, name):
            logits = engine.model(input_ids=torch.tensor([datum.tokens])).logits[0]
        found.append(logits.log_softmax(-1)[range(len(datum)), list(datum.targets)])
    return found


def t(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def importance(logp: Logp, data: Sequence[Datum], engine: Engine) -> Tensor:
    return -sum(
        (t(d.weights) * (p - t(d.logprobs)).exp() * t(d.advantages)).sum()
        for p, d in zip(logp, data, strict=True)
    )


def ppo(logp: Logp, data: Sequence[Datum], engine: Engine) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, d in zip(logp, data, strict=True):
        for n, weight in enumerate(d.weights):
            ratio, gain = (p[n] - d.logprobs[n]).exp(), d.advantages[n]
            total = total - weight * min(ratio * gain, ratio.clamp(0.7, 1.5) * gain)
    return total


def cispo(logp: Logp, data: Sequence[Datum], engine: Engine) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, d in zip(logp, data, strict=True):
        ratio = (p - t(d.logprobs)).exp().clamp(0, 4).detach()
        total = total - (t(d.weights) * ratio * t(d.advantages) * p).sum()
    return total


def preferred(reference: str | None, beta: float, smoothing: float = 0.0) -> Callable[..., Tensor]:
    def dpo(logp: Logp, data: Sequence[Datum], engine: Engine) -> Tensor:
        with torch.no_grad():
            before = all_logits(engine, data, reference)
        each = [(t(d.weights) * (p - q)).sum() for d, p, q in zip(data, logp, before, strict=True)]
        total = torch.zeros((), dtype=torch.float64)
        for chosen, rejected in zip(each[::2], each[1::2], strict=True):
            h = beta * (chosen - rejected)
            total = total - (1 - smoothing) * h.sigmoid().log() - smoothing * (-h).sigmoid().log()
        return total

    return dpo


def square(documents: Sequence[Document]) -> Tensor:
    """Of three answers at a time: how far their mean log-probabilities are from their mean."""
    means = torch.stack([(d.logp * d.weights).sum() / d.weights.sum() for d in documents])
    return (means - means.mean()).square().sum()


def squares(logp: Logp, data: Sequence[Datum], engine: Engine) -> Tensor:
    means = torch.stack(
        [(p * t(d.weights)).sum() / sum(d.weights) for p, d in zip(logp, data, strict=True)]
    )
    return sum((m - m.mean()).square().sum() for m in means.split(3))


def smoothed(logp: Logp, data: Sequence[Datum], engine: Engine) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for datum in data:
        with using(engine.model, "a"):
            logits = engine.model(input_ids=torch.tensor([datum.tokens])).logits[0]
        each = F.cross_entropy(
            logits, torch.tensor(datum.targets), reduction="none", label_smoothing=0.1
        )
        total = total + (each * t(datum.weights)).sum()
    return total


LOSSES: dict[str, tuple[Aim, Callable[..., Tensor]]] = {
    "cross_entropy": (CrossEntropy(label_smoothing=0.1), smoothed),
    "importance_sampling": ("importance_sampling", importance),
    "ppo": (PPO(clip_low_threshold=0.7, clip_high_threshold=1.5), ppo),
    "cispo": (CISPO(), cispo),
    "dpo": (DPO(beta=0.5), preferred(None, 0.5)),
    "dpo against an adapter": (
        DPO(beta=0.5, reference="b", label_smoothing=0.1),
        preferred("b", 0.5, 0.1),
    ),
    "custom": (Custom(function=square, size=3), squares),
}


def data_for(name: str, seed: int = 0) -> list[Datum]:
    data = given(6, seed)
    return [replace(d, logprobs=()) for d in data] if name.startswith("dpo") else data


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_all_logits(name: str) -> None:
    aim, twin = LOSSES[name]
    engine, data = an_engine(), data_for(name)
    result = engine.forward_backward(data, "a", aim)
    found = kit.gradients(trained(engine, "a"))
    engine._tenant("a").discard()
    logp = all_logits(engine, data, "a")
    loss = twin(logp, data, engine)
    loss.backward()
    assert sum(result.losses) == pytest.approx(float(loss.detach()), rel=1e-9)
    for one, other in zip(found, kit.gradients(trained(engine, "a")), strict=True):
        assert float(other.abs().max()) > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    for own, told, datum in zip(logp, result.logprobs, data, strict=True):
        kept = [n for n, weight in enumerate(datum.weights) if weight]
        assert told == pytest.approx(own.detach()[kept].tolist(), rel=1e-9)
    assert all(p.grad is None for p in trained(engine, "b"))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_do_not_depend_on_how_data_are_laid_out(packed: bool) -> None:
    for name in ("ppo", "dpo", "custom"):
        aim, data = LOSSES[name][0], data_for(name)
        whole = an_engine()
        want = whole.forward_backward(data, "a", aim)
        longest = max(map(len, data))
        engine = an_engine(micro=3 * longest, packed=packed)
        got = engine.forward_backward(data, "a", aim)
        assert got.losses == pytest.approx(want.losses, rel=1e-9)
        pairs = zip(trained(engine, "a"), trained(whole, "a"), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10)


def test_each_adapter_learns_what_it_is_told_as_it_would_alone() -> None:
    names = ["cross_entropy", "ppo", "dpo", "cispo", "custom", "importance_sampling"]
    plan = [(name, "abc"[n % 3], data_for(name, n)) for n, name in enumerate(names)]
    rows = [(d, owner, LOSSES[n][0]) for n, owner, data in plan for d in data]
    # the first of each, the second of each, ...: what belongs together does not lie together
    rows = [rows[start + step] for step in range(6) for start in range(0, len(rows), 6)]
    together, alone = an_engine(), an_engine()
    data, owners, aims = (list(column) for column in zip(*rows, strict=True))
    result = together.forward_backward(data, owners, aims)
    found: dict[str, list[float]] = {}
    for name, owner, own in plan:
        found[name] = list(alone.forward_backward(own, owner, LOSSES[name][0]).losses)
    for n, name in enumerate(names):
        assert result.losses[n::6] == pytest.approx(found[name], rel=1e-9)
    for owner in "abc":
        pairs = zip(trained(together, owner), trained(alone, owner), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)
        mine = together.optim_step(owner, AdamParams(lr=1e-3)).weight
        assert mine == pytest.approx(alone.optim_step(owner, AdamParams(lr=1e-3)).weight)


def test_a_pair_counts_one_and_a_step_may_leave_sums_as_they_are() -> None:
    engine, data = an_engine(), data_for("dpo")
    engine.forward_backward(data, "a", "dpo")
    step = engine.optim_step("a", AdamParams(lr=1e-9))
    assert step.weight == 3
    engine.forward_backward(data, "a", "dpo")
    plain = engine.optim_step("a", AdamParams(lr=1e-9, divide=False))
    assert plain.grad_norm == pytest.approx(3 * step.grad_norm, rel=1e-4)


def test_a_reference_comes_with_the_data_or_is_computed() -> None:
    engine, data = an_engine(), data_for("dpo")
    want = engine.forward(data, "a", DPO())
    told = engine.forward(data).logprobs
    brought = [d.with_logprobs(own) for d, own in zip(data, told, strict=True)]
    calls: list[object] = []
    handle = engine.model.model.register_forward_hook(lambda *given: calls.append(given))
    found = engine.forward(brought, "a", DPO())
    handle.remove()
    assert len(calls) == 1
    assert found.losses == pytest.approx(want.losses, rel=1e-12)
    assert found.metrics == want.metrics
    itself = engine.forward(data, "a", DPO(reference="a"))
    assert sum(itself.losses) == pytest.approx(3 * 0.6931471805599453)
    assert [m["margin"] for m in itself.metrics] == pytest.approx([0.0] * 6, abs=1e-12)


def test_metrics_of_a_policy_s_losses() -> None:
    engine = an_engine()
    (datum,) = given(1)
    (own,) = engine.forward([datum], "a").logprobs
    kept = [n for n, weight in enumerate(datum.weights) if weight]
    # exactly what the adapter gives, but for one token that was twice as likely and is to be made likelier still
    logprobs = dict(zip(kept, own, strict=True))
    logprobs[kept[0]] -= 0.6931471805599453
    before = tuple(logprobs.get(n, 0.0) for n in range(len(datum)))
    drawn = replace(datum, logprobs=before, advantages=(1.0,) * len(datum))
    (metrics,) = engine.forward([drawn], "a", "ppo").metrics
    share = datum.weights[kept[0]] / sum(datum.weights)
    assert metrics["ratio"] == pytest.approx(1 + share)
    assert metrics["clipped"] == pytest.approx(share)
    assert metrics["kl"] == pytest.approx(-0.6931471805599453 * share)
    (metrics,) = engine.forward([drawn], "a", CISPO(clip_high_threshold=1.5)).metrics
    assert metrics["clipped"] == pytest.approx(share)
    (metrics,) = engine.forward([drawn], "a", ImportanceSampling()).metrics
    assert metrics["clipped"] == 0


def test_what_a_loss_needs_is_asked_for_before_anything_is_computed() -> None:
    engine, data = an_engine(micro=64), kit.datums(3)
    engine.forward_backward(data, "b")
    calls = (
        ("ppo", DataError, "made.jsonl:1 has no logprobs, and PPO needs one for each target"),
        ("dpo", DataError, "DPO takes data 2 at a time, one after the other, and b was given 3"),
        (["cross_entropy"], DataError, "1 losses were given for 3 data"),
        ("pop", UnknownNameError, "unknown loss 'pop'.*ppo"),
    )
    for aim, error, match in calls:
        with pytest.raises(error, match=match):
            engine.forward_backward(data, "b", aim)
    with pytest.raises(UnknownNameError, match="no adapter 'z'"):
        engine.forward_backward(data[:2], "b", DPO(reference="z"))
    small = an_engine(micro=max(map(len, data)))
    with pytest.raises(DataError, match="must be seen together with 1 more"):
        small.forward_backward(data[:2], "b", "dpo")
    with pytest.raises(DataError, match="tokens and 2 advantages"):
        replace(data[0], advantages=(1.0, 2.0))
    with pytest.raises(ConfigError, match="clip_low_threshold <= clip_high_threshold"):
        PPO(clip_low_threshold=2.0)
    with pytest.raises(ConfigError, match="gives one number"):
        engine.forward_backward(data, "b", Custom(function=lambda documents: documents[0].logp))
