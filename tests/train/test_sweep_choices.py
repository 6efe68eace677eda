"""What a sweep chooses, when it decides, and where it goes on."""

from __future__ import annotations

import itertools
import math
import random
import sys
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import ConfigError, MissingPackageError
from trimtab.train.sweep.config import SweepConfig
from trimtab.train.sweep.halving import Rung, budget, rungs
from trimtab.train.sweep.resuming import Saved, moments
from trimtab.train.sweep.samplers import Sampler, samplers
from trimtab.train.sweep.space import Between, Choice, given_options, space_of


def asked(overrides: list[str], **config: Any) -> list[list[Choice]]:
    """The rounds of a sampler that is told a loss for each."""
    sampler = made(overrides, **config)
    found = []
    while choices := sampler.ask():
        found.append(choices)
        for number, choice in enumerate(choices):
            sampler.tell(choice, 10, 0.5 + number, whole=number == 0)
    return found


def made(overrides: list[str], **config: Any) -> Sampler:
    chosen = SweepConfig(**config)
    return samplers.get(chosen.sampler)(space_of(given_options(overrides)).axes, chosen)


# -- samplers ----------------------------------------------------------------------------------------


def test_a_grid_is_every_combination() -> None:
    overrides = ["optim.lr=[1e-4,3e-4]", "seed=3", "method.rank=[4,8,16]"]
    (found,) = asked(overrides)
    pairs = [(choice["optim.lr"], choice["method.rank"]) for choice in found]
    assert pairs == [(lr, rank) for lr in (1e-4, 3e-4) for rank in (4, 8, 16)]
    assert [len(choices) for choices in asked(overrides, together=4)] == [4, 2]


def test_chance_is_that_of_the_seed_and_repeats_nothing() -> None:
    overrides = ["optim.lr=log(1e-5,1e-2)", "optim.warmup=uniform(0,0.5)", "method.rank=int(2,5)"]
    (found,) = asked(overrides, sampler="random", count=200, seed=1)
    assert asked(overrides, sampler="random", count=200, seed=1) == [found]
    assert asked(overrides, sampler="random", count=200, seed=2) != [found]
    assert {choice["method.rank"] for choice in found} == {2, 3, 4, 5}
    assert all(0 <= choice["optim.warmup"] <= 0.5 for choice in found)
    rates = [choice["optim.lr"] for choice in found]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    below = sum(rate < math.sqrt(1e-5 * 1e-2) for rate in rates)
    assert 70 <= below <= 130  # half of them on a logarithmic scale
    few = ["seed=[1,2]", "method.rank=int(2,4)"]
    (all_of_them,) = asked(few, sampler="random", count=6)
    assert len({tuple(choice.values()) for choice in all_of_them}) == 6
    assert [len(part) for part in asked(few, sampler="random", count=5, together=2)] == [2, 2, 1]
    with pytest.raises(ConfigError, match="there are 6 combinations, and --random asks for 7"):
        asked(few, sampler="random", count=7)


def test_what_is_drawn_is_short_and_stays_inside() -> None:
    axis = Between(0.00123456, 0.00123457, log=True)
    drawn = axis.draw(random.Random(0))
    assert axis.low <= drawn <= axis.high
    assert Between(0.0, 1.0).rounded(0.123456) == 0.123


def test_optuna_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'trimtab\[optuna\]'"):
        made(["optim.lr=log(1e-5,1e-2)"], sampler="optuna", count=8)


def test_optuna_learns_from_round_to_round() -> None:
    def losses_of(seed: int) -> list[list[float]]:
        overrides = ["optim.lr=log(1e-6,1)", "method.rank=int(2,64)", "seed=[0,7]"]
        sampler = made(overrides, sampler="optuna", count=48, seed=seed)
        rounds = []
        while choices := sampler.ask():
            losses = [abs(math.log10(choice["optim.lr"]) + 3) for choice in choices]
            kept = sorted(losses)[: len(losses) // 2]
            for number, (choice, loss) in enumerate(zip(choices, losses, strict=True)):
                failed = number == 0
                sampler.tell(choice, 5, None if failed else loss, whole=loss in kept)
            rounds.append(losses)
        return rounds

    first, *_, last = found = losses_of(0)
    assert [len(losses) for losses in found] == [12, 12, 12, 12]
    assert losses_of(0) == found
    assert losses_of(1) != found
    assert sum(last) < sum(first) / 2


def test_counts_belong_to_samplers_that_draw() -> None:
    with pytest.raises(ConfigError, match="--random draws so many"):
        SweepConfig(count=4)
    with pytest.raises(ConfigError, match="--random N"):
        SweepConfig(sampler="optuna")
    with pytest.raises(ConfigError, match="given twice"):
        given_options(["seed=[1,2]", "seed=[3,4]"])


# -- decisions ---------------------------------------------------------------------------------------


def test_eight_are_halved_three_times() -> None:
    found = rungs(8, 2, 1, [48])
    assert [(rung.step(48), rung.keep) for rung in found] == [(6, 4), (12, 2), (24, 1)]
    assert budget(8, found, 48) == 8 * 6 + 4 * 6 + 2 * 12 + 24
    assert rungs(8, 1, 1, [48]) == ()
    assert [(rung.step(48), rung.keep) for rung in rungs(9, 3, 1, [48])] == [(6, 3), (16, 1)]


def test_no_decision_comes_before_its_first_step() -> None:
    assert [rung.keep for rung in rungs(8, 2, 10, [48])] == [2, 1]
    assert [rung.keep for rung in rungs(8, 2, 10, [48, 24])] == [1]
    assert rungs(8, 2, 3, [3]) == ()


@given(
    count=st.integers(1, 40),
    eta=st.integers(2, 5),
    first=st.integers(1, 5),
    totals=st.lists(st.integers(1, 100), min_size=1, max_size=3),
)
def test_decisions_come_one_after_the_other(
    count: int, eta: int, first: int, totals: list[int]
) -> None:
    found = rungs(count, eta, first, totals)
    for before, after in itertools.pairwise(found):
        assert before.share < after.share and before.keep > after.keep
    for rung in found:
        assert 1 <= rung.keep <= count / eta
        assert Fraction(0) < rung.share <= Fraction(1, eta)
        assert all(first <= rung.step(total) <= total for total in totals)
    assert len(found) <= math.log(count, eta) + 1e-9
    steps = [{rung.step(total) for rung in found} for total in totals]
    assert not found or max(map(len, steps)) >= 1


def test_a_rung_is_a_share_of_each_ones_steps() -> None:
    assert [Rung(Fraction(1, 4), 2).step(total) for total in (12, 13, 3)] == [3, 4, 1]


# -- where it goes on --------------------------------------------------------------------------------


def saved(*steps: int, waits: int = 100) -> Saved:
    return Saved(frozenset(steps), waits)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([saved(10, 20), saved(10, 20)], [20, 20]),
        ([saved(10, 20), saved(10)], [10, 10]),  # killed between two checkpoints
        ([saved(10), saved()], [0, 0]),
        ([saved(4, 5, waits=5), saved(7, 8)], [5, 8]),  # the first one waits
        ([saved(4, 5, waits=5), saved(5, 6, waits=9), saved(4, 5, waits=9)], [5, 5, 5]),
        ([saved(4, waits=5), saved(7, 8)], [0, 0]),
    ],
)
def test_all_go_on_at_the_last_moment_that_is_whole(
    found: list[Saved], expected: list[int]
) -> None:
    assert moments(found) == expected
