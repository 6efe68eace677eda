"""Schedules as functions of the step, and the optimiser's own promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trimtab.errors import ConfigError, FileFormatError, NonFiniteLossError
from trimtab.optim import AdamParams, learning_rate
from trimtab.optim.adam import Adam
from trimtab.optim.schedule import part_of


def test_schedules() -> None:
    constant = [learning_rate("constant", 2.0, step, 6, warmup=2) for step in range(6)]
    assert constant == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    linear = [learning_rate("linear", 1.0, step, 6, warmup=2) for step in range(6)]
    assert linear == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = [learning_rate("cosine", 1.0, step, 4) for step in range(4)]
    assert cosine[0] == 1.0
    assert cosine[2] == pytest.approx(0.5)
    assert all(value > 0 for value in linear + cosine)
    with pytest.raises(ConfigError, match="outside"):
        learning_rate("linear", 1.0, 4, 4)


def test_warmup_is_a_fraction_or_a_number() -> None:
    assert part_of(0.1, 25) == 3
    assert part_of(5, 25) == 5
    assert part_of(50, 25) == 25
    assert part_of(0, 25) == 0


def named() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"matrix": nn.Parameter(torch.randn(3, 4)), "vector": nn.Parameter(torch.ones(4))}


def stepped(adam: Adam, weight: float) -> float:
    """One step as the engine does it."""
    adam.normalise(weight)
    norm = adam.step(AdamParams(lr=0.1))
    adam.clear()
    return norm


def test_gradients_are_divided_and_clipped() -> None:
    seen = []
    for weight, factor in ((1.0, 1.0), (8.0, 8.0)):
        tensors = named()
        adam = Adam(tensors)
        for parameter in tensors.values():
            parameter.grad = torch.full_like(parameter, 5.0 * factor)
        seen.append((stepped(adam, weight), tensors["matrix"].detach().clone()))
    assert seen[0][0] == pytest.approx(seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1])


def test_weight_decay_leaves_vectors_alone() -> None:
    tensors = named()
    before = {key: value.detach().clone() for key, value in tensors.items()}
    for parameter in tensors.values():
        parameter.grad = torch.zeros_like(parameter)
    Adam(tensors).step(AdamParams(lr=0.1, weight_decay=0.5))
    assert torch.equal(tensors["vector"], before["vector"])
    torch.testing.assert_close(tensors["matrix"].detach(), before["matrix"] * 0.95)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    tensors = named()
    adam = Adam(tensors)
    before = tensors["matrix"].detach().clone()
    for parameter in tensors.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(NonFiniteLossError):
        stepped(adam, 1.0)
    assert torch.equal(tensors["matrix"], before)
    assert not adam.state()


def test_the_state_continues_bitwise() -> None:
    def run(steps: int, adam: Adam, tensors: dict[str, nn.Parameter], first: int = 0) -> None:
        for step in range(first, steps):
            for parameter in tensors.values():
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            stepped(adam, 1.0)

    straight = named()
    run(6, Adam(straight), straight)
    broken = named()
    adam = Adam(broken)
    run(3, adam, broken)
    state = adam.state()
    again = {key: nn.Parameter(value.detach().clone()) for key, value in broken.items()}
    other = Adam(again)
    other.restore(state)
    run(6, other, again, first=3)
    assert all(torch.equal(straight[key], again[key]) for key in straight)


def test_a_foreign_state_is_refused() -> None:
    tensors = named()
    with pytest.raises(FileFormatError, match="not this adapter's"):
        Adam(tensors).restore({"exp_avg::other": torch.zeros(1)})
    with pytest.raises(FileFormatError, match="shape"):
        Adam(tensors).restore({"exp_avg::vector": torch.zeros(1)})


def test_wsd_stays_and_then_decays_to_the_floor() -> None:
    rates = [
        learning_rate("wsd", 2.0, step, 12, warmup=2, decay=4, floor=0.25) for step in range(12)
    ]
    assert rates[:2] == [1.0, 2.0]
    assert rates[2:8] == [2.0] * 6
    shares = [1 - math.sqrt(place / 4) for place in range(4)]
    assert rates[8:] == pytest.approx([2 * (0.25 + 0.75 * share) for share in shares])
    assert min(learning_rate("cosine", 1.0, step, 50, floor=0.1) for step in range(50)) >= 0.1
    # A decay longer than what follows the warm-up takes all of it.
    assert learning_rate("wsd", 1.0, 2, 4, warmup=2, decay=9) == 1.0


def test_the_average_is_that_of_the_recurrence() -> None:
    draw = torch.Generator().manual_seed(3)
    named = {"b": nn.Parameter(torch.zeros(2)), "a": nn.Parameter(torch.zeros(3, 2))}
    optimiser = Adam(named)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 31):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimiser.step(AdamParams(lr=0.1, ema=0.7))
        decay = min(0.7, step / (step + 9))
        for key, parameter in named.items():
            old = expected.get(key, parameter.detach())
            expected[key] = decay * old + (1 - decay) * parameter.detach()
    state = optimiser.state()
    tensors = {key: parameter.detach().clone() for key, parameter in named.items()}
    other = Adam(named)
    other.restore(state)
    for one in (optimiser, other):
        with one.average.acting():
            for key, value in expected.items():
                assert torch.allclose(named[key], value, atol=1e-6)
                assert not torch.equal(named[key], tensors[key])
        assert all(torch.equal(named[key], value) for key, value in tensors.items())
    assert other.state().keys() == state.keys()
    assert all(torch.equal(value, other.state()[key]) for key, value in state.items())
