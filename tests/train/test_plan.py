"""The plan says what a run then counts, and writes nothing. How near its times come is a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import kit
from tests.train.kit import go
from trimtab.errors import DataError
from trimtab.train.events import read_events
from trimtab.train.plan import Plan, plan
from trimtab.train.setup import saves


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": {"tokens": 150}, "epochs": 3},
        {"steps": 7, "eval__metric": "choice", "eval__midway": "answers"},
        {"data__held_out": None, "eval__every": None},
    ],
    ids=["plain", "tokens", "answers", "nothing-held-out"],
)
def test_it_counts_what_the_run_counts(home: Path, options: dict[str, Any]) -> None:
    before = sorted(path.name for path in home.iterdir())
    found = plan(kit.recipe(home, "run", **options))
    assert sorted(path.name for path in home.iterdir()) == before
    done = go(kit.recipe(home, "run", **options))
    events = read_events(home / "run" / "events.jsonl")
    start, end = events[0], events[-1]
    assert (found.steps, found.trained) == (done.steps, start["parameters"])
    # Steps of an unfinished epoch are of about the mean size.
    assert found.tokens == pytest.approx(end["tokens"], rel=0.1)
    assert dict(found.rows)["trained"] == dict(start["plan"])["trained"]
    assert found.peak > 50e6 and found.fits
    assert found.training > 0 and found.saving > 0
    written = len([event for event in events if event["event"] == "checkpoint"])
    measured = options.get("data__held_out", "") is not None
    assert saves(kit.recipe(home, "run", **options), done.steps, measured=measured) == written
    assert found.measuring > 0


def test_a_stream_is_planned_from_its_first_steps(home: Path) -> None:
    found = plan(kit.recipe(home, "run", data__stream=True, steps=9))
    assert found.steps == 9
    assert "of the first" in dict(found.rows)["tokens"]


def test_it_stops_at_what_would_stop_the_run(home: Path) -> None:
    with pytest.raises(DataError, match="more than a step may have"):
        plan(kit.recipe(home, "run", batch={"tokens": 20}))


def test_what_does_not_fit_is_said() -> None:
    parts = {"rows": [], "steps": 1, "tokens": 1, "trained": 1, "training": 1.0}
    parts |= {"measuring": 1.5, "saving": 0.5}
    assert not Plan(**parts, peak=2**34, available=2**33).fits
    assert Plan(**parts, peak=2**34, available=None).fits
    assert Plan(**parts, peak=1, available=2).seconds == 3.0
