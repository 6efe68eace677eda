"""Several adapters in one call: what concerns one of them concerns no other."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.engine import kit
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import NonFiniteLossError, TrainingError
from trimtab.optim import AdamParams

STEP = AdamParams(lr=1e-2)
METHODS = {
    "a": "lora(rank=2)",
    "b": "lora(rank=3, targets='all-linear')",
    "c": "dora(rank=2)",
    "d": "ia3",
    "e": "bottleneck(size=4)",
    "f": "prefix(length=3)",
    "g": "spottune(inner='lora(rank=2)', blocks=1)",
    "h": "llama-adapter(length=3)",
    "i": "prompt(length=2)",
}
NAMES = list(METHODS)


def tenants(*, packed: bool = False, micro: int = 4096) -> tuple[Engine, dict[str, Adapter]]:
    """An engine with an adapter of each method, all of which do something."""
    base = kit.base()
    engine = Engine(base, packed=packed, micro_tokens=micro)
    adapters = {name: attach(base.model, method, name) for name, method in METHODS.items()}
    with torch.no_grad():
        for adapter in adapters.values():
            for number, parameter in enumerate(adapter.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return engine, adapters


def shared(count: int = 2) -> tuple[list[Datum], list[str]]:
    """So many data for each, which do not lie together."""
    data = kit.datums(count * len(NAMES))
    return data, NAMES * count


def gradients(adapter: Adapter) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in adapter.parameters()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return len(one) == len(other) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@cache
def healthy(packed: bool) -> dict[str, list[Tensor | None]]:
    """The gradients of all, where nothing is wrong."""
    data, owners = shared()
    engine, adapters = tenants(packed=packed)
    assert all(micro.packed == packed for micro in engine.micro_batches(data, owners))
    torch.manual_seed(7)  # for gates that draw
    engine.forward_backward(data, owners)
    found = {name: gradients(adapter) for name, adapter in adapters.items()}
    assert all(any(g is not None and g.any() for g in own) for own in found.values())
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("victim", NAMES)
def test_a_loss_that_is_not_finite_is_its_tenant_s_alone(victim: str, packed: bool) -> None:
    data, owners = shared()
    before = healthy(packed)
    engine, adapters = tenants(packed=packed)
    with torch.no_grad():
        next(iter(adapters[victim].parameters())).fill_(math.nan)
    torch.manual_seed(7)
    result = engine.forward_backward(data, owners)
    assert list(result.errors) == [victim]
    first = data[owners.index(victim)].origin
    with pytest.raises(NonFiniteLossError, match=rf"{first}\b.* No tensor"):
        raise result.errors[victim]
    for name, adapter in adapters.items():
        found = gradients(adapter)
        if name == victim:
            assert all(gradient is None for gradient in found)
            with pytest.raises(TrainingError, match="no gradients"):
                engine.optim_step(name, STEP)
        else:
            assert same(found, before[name]), name
            assert engine.optim_step(name, STEP).step == 1


def test_the_sick_one_s_other_micro_batches_are_dropped_and_the_others_go_on() -> None:
    data, owners = kit.datums(8), ["a", "b"] * 4
    engine, adapters = tenants(micro=40)
    engine.forward_backward(data[::2], "a")
    assert len(list(engine.micro_batches(data, owners))) > 3
    poison = data[2].tokens[-1]
    unharmed = [i for i, d in enumerate(data) if poison not in d.tokens and owners[i] == "b"]
    assert len(unharmed) == 4
    alone, others = tenants(micro=40)
    alone.forward_backward([data[i] for i in unharmed], "b")
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[poison] = math.nan
    result = engine.forward_backward(data, owners)
    assert list(result.errors) == ["a"]
    assert data[2].origin in str(result.errors["a"])
    assert all(gradient is None for gradient in gradients(adapters["a"]))
    for one, other in zip(gradients(adapters["b"]), gradients(others["b"]), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert engine.optim_step("b", STEP).weight == sum(sum(data[i].weights) for i in unharmed)


@pytest.mark.parametrize("micro", [4096, 64])
def test_documents_of_several_adapters_share_rows_and_train_as_alone(micro: int) -> None:
    data, owners = shared(3)
    together, alone = tenants(packed=True, micro=micro), tenants(packed=False)
    for model in (together[0].model, alone[0].model):
        model.double()
    plan = list(together[0].micro_batches(data, owners))
    assert (len(plan) == 1) == (micro == 4096)
    assert sum(m.batch.input_ids.numel() for m in plan) == sum(map(len, data))  # no padding
    assert sorted(index for m in plan for index in m.members) == list(range(len(data)))
    assert max(len(set(m.owners)) for m in plan) > 2
    for m in plan:
        assert len(set(m.owners)) == 1 + sum(a != b for a, b in pairwise(m.owners))
    torch.manual_seed(3)
    together[0].forward_backward(data, owners)
    for name in NAMES:
        if name == "g":
            continue  # its gates draw
        mine = [datum for datum, owner in zip(data, owners, strict=True) if owner == name]
        alone[0].forward_backward(mine, name)
        found = zip(gradients(together[1][name]), gradients(alone[1][name]), strict=True)
        for one, other in found:
            assert one is not None and other is not None
            torch.testing.assert_close(one, other, rtol=1e-7, atol=2e-6)


def test_the_cheaper_layout_is_taken() -> None:
    engine, _ = tenants()
    engine.packed = None
    ragged = [datum for n in range(6) for datum in kit.datums(2, seed=n, longest=10 + 18 * n)]
    alike = [Datum.causal(range(20), [1.0] * 20) for _ in ragged]
    owners = ["a", "b"] * 6
    assert [m.packed for m in engine.micro_batches(ragged, owners)] == [True]
    assert [m.packed for m in engine.micro_batches(alike, owners)] == [False]
    engine._layout = replace(engine._layout, apart=False)
    assert not any(m.packed for m in engine.micro_batches(ragged, owners))


def test_held_out_losses_that_are_not_finite_are_told_apart_too() -> None:
    data, owners = kit.datums(3), ["a", None, "b"]
    engine, adapters = tenants()
    want = engine.forward(data, owners)
    with torch.no_grad():
        for parameter in adapters["a"].parameters():
            parameter.fill_(math.inf)
    found = engine.forward(data, owners)
    assert list(found.errors) == ["a"]
    assert list(found.sums[1:]) == list(want.sums[1:])
    with pytest.raises(NonFiniteLossError):
        engine.forward(data[:1], "a")
