"""The plan says what a run then counts, and writes nothing. How near its times come is a benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.train import kit
from tests.train.kit import go
from trimtab.errors import DataError
from trimtab.train.events import read_events
from trimtab.train.plan import Times, plan
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
    times = found.times
    assert times is not None and times.training > 0 and times.saving > 0
    written = len([event for event in events if event["event"] == "checkpoint"])
    measured = options.get("data__held_out", "") is not None
    assert saves(kit.recipe(home, "run", **options), done.steps, measured=measured) == written
    assert times.measuring > 0 and times.how == "a few real steps here"


def test_a_stream_is_planned_from_its_first_steps(home: Path) -> None:
    found = plan(kit.recipe(home, "run", data__stream=True, steps=9))
    assert found.steps == 9
    assert "of the first" in dict(found.rows)["tokens"]


def test_it_stops_at_what_would_stop_the_run(home: Path) -> None:
    with pytest.raises(DataError, match="more than a step may have"):
        plan(kit.recipe(home, "run", batch={"tokens": 20}))


def test_what_does_not_fit_is_said(home: Path) -> None:
    whole = plan(kit.recipe(home, "run", eval={"forgetting": False}, data__held_out=None), dry=True)
    assert whole.fits and whole.proposal is None
    assert not replace(whole, available=whole.peak - 1).fits
    assert replace(whole, available=None).fits
    assert Times(1.0, 1.5, 0.5, "").total == 3.0
