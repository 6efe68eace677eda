"""Adapters in training that come down and go up again: training goes on as if they had stayed, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

import trimtab as tt
from tests.engine import kit
from trimtab.adapt.active import Hold, Waiting
from trimtab.adapt.bank import bank_of, find_bank
from trimtab.adapt.sources import AdapterFolder
from trimtab.adapt.tiers import Budgets, Tiers
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.engine.tiers import StateFolder
from trimtab.errors import ConfigError, FileFormatError
from trimtab.optim import AdamParams

STEP = AdamParams(lr=1e-2, clip=1.0, ema=0.9, total=8)
METHODS = (
    "lora(rank=4, dropout=0.2)",
    "adalora(rank=4, target_rank=2)",
    "prefix(length=3)",
    "spottune(inner=lora(rank=2), hidden=4)",
)


def up(tiers: Tiers, name: str) -> Hold:
    for _ in range(4):
        found = tiers.hold(name)
        if isinstance(found, Hold):
            return found
        assert found is Waiting.READING
        tiers.wait(10)
    raise AssertionError("it is never there")


def engine_with(method: str, name: str = "a", folder: Path | None = None) -> Engine:
    base = kit.base()
    tt.attach(base.model, method, name)
    return Engine(base, folder=folder)


def train(engine: Engine, data: list[Datum], move: Callable[[], None]) -> dict[str, Tensor]:
    """Three steps of two calls each; ``move`` comes between any two of them."""
    torch.manual_seed(3)
    for _ in range(3):
        engine.forward_backward(data[:3], "a")
        move()
        engine.forward_backward(data[3:], "a")
        move()
        engine.optim_step("a", STEP)
        move()
    adapter = bank_of(engine.model).require("a")
    tenant = engine.tenants.of(adapter)
    found = {**adapter.tensors, **tenant.adam.state(), **tenant.stepper.memory}
    return {key: tensor.detach().clone() for key, tensor in found.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("through", ["host", "disk"])
def test_training_goes_on_bitwise(
    method: str, through: Literal["host", "disk"], tmp_path: Path
) -> None:
    data = kit.datums(6)
    expected = train(engine_with(method), data, lambda: None)
    engine = engine_with(method, folder=tmp_path)
    tiers = engine.tiers
    tiers.adopt("a")

    def move() -> None:
        generator = torch.get_rng_state()
        tiers.lower("a", through)
        assert tiers.tier("a") == through and find_bank(engine.model) is None
        assert (tiers.host_bytes == 0) == (through == "disk") and tiers.active_bytes == 0
        up(tiers, "a").release()
        assert torch.equal(torch.get_rng_state(), generator)

    found = train(engine, data, move)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert engine.tenants.of(bank_of(engine.model).require("a")).steps == 3


def test_a_state_folder_is_taken_up_and_goes_on(tmp_path: Path) -> None:
    data = kit.datums(6)
    engine = engine_with("lora(rank=4)")
    for _ in range(2):
        engine.forward_backward(data, "a")
        engine.optim_step("a", STEP)
    engine.forward_backward(data[:2], "a")  # in the middle of a step
    engine.save("a", tmp_path / "state", {"cursor": [1, 2]})
    engine.forward_backward(data[2:], "a")
    engine.optim_step("a", STEP)
    expected = bank_of(engine.model).require("a")

    other = Engine(kit.base(), folder=tmp_path / "moved")
    tiers = other.tiers
    tiers.register("a", StateFolder(tmp_path / "state"))
    with up(tiers, "a"):
        other.forward_backward(data[2:], "a")
    tiers.lower("a")
    up(tiers, "a").release()
    other.optim_step("a", STEP)
    assert bank_of(other.model).require("a") == expected
    other.save("a", tmp_path / "again", {})
    tiers.lower("a")
    tiers.lower("a")  # it is down already


def test_what_a_caller_added_to_a_state_stays_with_it(tmp_path: Path) -> None:
    engine = engine_with("lora(rank=4)")
    engine.forward_backward(kit.datums(2), "a")
    engine.save("a", tmp_path / "state", {"cursor": [1, 2]})
    one = 3 * bank_of(engine.model).require("a").nbytes
    other = Engine(kit.base(), budgets=Budgets(active=one, host=one), folder=tmp_path / "moved")
    tiers = other.tiers
    tiers.register("a", StateFolder(tmp_path / "state"))
    up(tiers, "a").release()
    other.optim_step("a", STEP)  # moments make it larger than host memory
    tiers.lower("a")
    assert tiers.tier("a") == "disk"
    with pytest.raises(ConfigError, match="takes .* in host memory, where all may take"):
        tiers.hold("a")
    third = Engine(kit.base())
    assert third.load(tmp_path / "moved" / "a") == {"cursor": [1, 2]}


def test_one_is_trained_while_another_answers(tmp_path: Path) -> None:
    """Both through one registry: what answers is no tenant, and what is trained keeps its masters."""
    data = kit.datums(4)
    served = engine_with("ia3", "served")
    tt.detach(served.model, "served").save(tmp_path / "served")
    engine = engine_with("lora(rank=4)")
    tiers = engine.tiers
    tiers.adopt("a")
    tiers.register("served", AdapterFolder(tmp_path / "served"))
    with up(tiers, "a"), up(tiers, "served"):
        engine.forward_backward(data, "a")
        engine.forward(data, ["a", "served", None, "a"])
    tiers.lower("served")
    with up(tiers, "served"):
        assert engine.tenants.known(bank_of(engine.model).require("served")) is None


def test_an_adapter_that_nobody_has_trained_yet_learns_where_it_comes_up(tmp_path: Path) -> None:
    engine = engine_with("lora(rank=4)", folder=tmp_path)
    tiers = engine.tiers
    tiers.adopt("a")
    for tier in ("host", "disk"):
        tiers.lower("a", tier)
        up(tiers, "a").release()
    engine.forward_backward(kit.datums(2), "a")
    assert engine.optim_step("a", STEP).grad_norm > 0


def test_a_torn_state_is_that_adapters_error(tmp_path: Path) -> None:
    engine = engine_with("lora(rank=4)")
    engine.forward_backward(kit.datums(2), "a")
    engine.save("a", tmp_path / "state")
    tiers = engine.tiers
    tiers.register("b", StateFolder(tmp_path / "state"))
    file = tmp_path / "state" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert tiers.hold("b") is Waiting.READING
    tiers.wait(10)
    with pytest.raises(FileFormatError, match="was changed since"):
        tiers.hold("b")
    with pytest.raises(FileFormatError, match="torn or foreign"):
        tiers.register("c", StateFolder(tmp_path / "state"))


def test_a_state_of_another_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its optimiser's tensors are not those of its adapter, which is seen when it is to go on."""
    engine = engine_with("lora(rank=4)")
    for name, method in (("b", "lora(rank=2)"), ("a", "")):
        if method:
            tt.attach(engine.model, method, name)
        engine.forward_backward(kit.datums(2), name)
        engine.optim_step(name, STEP)
        engine.save(name, tmp_path / name)
    (tmp_path / "b" / "state.safetensors").replace(tmp_path / "a" / "state.safetensors")
    tiers = engine.tiers
    tiers.register("new", StateFolder(tmp_path / "a"))
    with pytest.raises(FileFormatError, match="has shape"):
        up(tiers, "new")
    assert tiers.tier("new") == "host" and tiers.active_bytes == 0
    assert "new" not in bank_of(engine.model).adapters and len(engine.tenants) == 2


def test_an_engine_keeps_nothing_of_adapters_that_were_detached() -> None:
    engine, data = engine_with("lora(rank=4)"), kit.datums(2)
    for number in range(3):
        engine.forward_backward(data, "a")
        first = engine.tenants.of(bank_of(engine.model).require("a"))
        tt.detach(engine.model, "a")
        tt.attach(engine.model, "lora(rank=4)", f"b{number}")
        engine.forward_backward(data, f"b{number}")
        assert first not in engine.tenants
        tt.attach(engine.model, "lora(rank=4)", "a")
    assert len(engine.tenants) == 3
