"""The harness: turns, ratios, memory of the step alone, failures that say what happened."""

from __future__ import annotations

import statistics

import pytest

from benchmarks import core
from benchmarks.core import Patience, Sample, Side, Spread

TARGET = "tests.benchmarks.sides:Sleeper"
HURRY = Patience(quiet=1.1, seconds=0)


def sleepers() -> list[Side]:
    return [
        Side("ours", TARGET, {"seconds": 0.02}),
        Side("peer", TARGET, {"seconds": 0.08, "fill": 200_000_000}),
    ]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    with core.workers(sleepers(), "tuned", threads=1) as running:
        return core.take_turns(running, warmup=1, rounds=3, patience=HURRY)


def test_sides_take_turns_in_alternating_order(samples: list[Sample]) -> None:
    assert [sample.side for sample in samples] == ["ours", "peer", "peer", "ours"] * 2
    assert [sample.step for sample in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [sample.result["number"] for sample in samples] == [sample.step for sample in samples]


def test_warm_up_is_not_counted(samples: list[Sample]) -> None:
    assert [sample.step for sample in core.of_side(samples, "ours")] == [1, 2, 3]


def test_ratios_and_rates(samples: list[Sample]) -> None:
    speed = core.ratio(samples, "ours", "peer", lambda sample: sample.rate)
    ours, peer = (core.of_side(samples, name) for name in ("ours", "peer"))
    ratios = [b.seconds / a.seconds for a, b in zip(ours, peer, strict=True)]
    assert [a.step for a in ours] == [b.step for b in peer]
    assert (speed.low, speed.high) == pytest.approx((min(ratios), max(ratios)))
    assert speed.median == pytest.approx(statistics.median(ratios))
    assert all(sample.seconds >= 0.08 for sample in peer)


def test_memory_is_the_high_water_mark_of_the_step(samples: list[Sample]) -> None:
    mine, other = (core.of_side(samples, name)[0].peak_bytes for name in ("ours", "peer"))
    assert 150e6 < other - mine < 250e6


def test_both_sides_have_the_allocator_that_was_asked_for(samples: list[Sample]) -> None:
    kept = ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"]
    assert all(sample.result["malloc"] == kept for sample in samples)
    with core.workers(sleepers(), "default", threads=1) as running:
        assert [worker.step(0).result["malloc"] for worker in running.values()] == [[], []]


def test_a_failing_side_is_an_error_with_its_traceback() -> None:
    with (
        core.workers(sleepers()[:1], "default", threads=1) as running,
        pytest.raises(core.SideError, match="on purpose"),
    ):
        running["ours"].call("fail")


@pytest.mark.parametrize(
    ("others", "counted"), [((0.5, 0.0, 0.05), [1, 2]), ((0.5, 0.3, 0.0, 0.2), [2, 3])]
)
def test_the_quietest_rounds_are_counted(others: tuple[float, ...], counted: list[int]) -> None:
    class Noisy:
        """As a worker, on a machine where others are busy."""

        def step(self, number: int) -> Sample:
            return Sample("one", number, 1.0, 1.0, others[number], 1, {})

    patience = Patience(quiet=0.1, seconds=0, factor=2)
    found = core.take_turns({"one": Noisy()}, warmup=0, rounds=2, patience=patience)  # type: ignore[dict-item]
    assert len(found) == len(others)
    assert [sample.step for sample in found if sample.counted] == counted


def test_a_spread_is_a_median_and_its_range() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([0.25, 0.5]).text(0, 100) == "38 (25 … 50)"
