"""However a run is stopped, it ends bitwise where an undisturbed one does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from tests.laws.cells import SMALL
from tests.train import kit
from tests.train.kit import go, killed_after, steps_of
from trimtab.adapt.adapter import Adapter
from trimtab.train.recipe import Recipe

KILLS = 20
DROPOUT = {"lora", "dora"}
OWN: dict[str, Any] = {"full": {"kind": "full", "targets": "all"}}


def method_of(kind: str) -> Any:
    """The method, small, and with randomness of its own where it has any."""
    if kind in OWN:
        return OWN[kind]
    values = tt.method(SMALL.get(kind, kind)).to_dict()
    return {**values, "dropout": 0.2} if kind in DROPOUT else values


def assert_same(one: Path, other: Path) -> None:
    """The adapters, the optimisers' states and the noted steps are the same, bit for bit."""
    assert Adapter.load(one / "adapter") == Adapter.load(other / "adapter")
    assert steps_of(one) == steps_of(other)
    last = max(path.name for path in (one / "checkpoints").iterdir())
    for name in ("state.safetensors", "adapter/adapter_model.safetensors"):
        files = [folder / "checkpoints" / last / name for folder in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def kill_and_resume(recipe: Recipe, kills: int, lines: int, seed: int) -> int:
    """Kill the run at random moments (up to ``lines`` events and a moment after it is taken up), then let
    it finish; how often it was killed at work."""
    draw = random.Random(seed)
    events = Path(recipe.out or "") / "events.jsonl"
    count = 0
    for _ in range(2 * kills):  # a process that ended before it was killed does not count
        if count < kills:
            grown = (events, draw.randrange(lines))
            moment = draw.uniform(0, 0.03)
            count += killed_after(moment, lambda: go(recipe, resume=True), grown=grown)
    go(recipe, resume=True)
    return count


def resumed_at(folder: Path) -> set[int]:
    """The steps at which the run was taken up again."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    resumes = [line for line in lines if '"event": "resume"' in line]
    return {json.loads(line)["step"] for line in resumes if line.endswith("}")}


def test_killed_twenty_times_it_ends_bitwise_where_an_undisturbed_run_does(home: Path) -> None:
    """kill -9 at random moments, while a checkpoint is written after every second step."""
    options = {
        "checkpoint__every": 2, "steps": 160, "eval__every": 12, "optim__ema": 0.9,
        "data__duplicates": "drop", "optim__schedule": "wsd",
    }  # fmt: skip
    whole = go(kit.recipe(home, "whole", **options))
    recipe = kit.recipe(home, "killed", **options)
    assert kill_and_resume(recipe, KILLS, 10, seed=1) == KILLS
    assert len(resumed_at(home / "killed")) >= 4
    assert_same(whole.folder, home / "killed")
    assert [step for step, *_ in steps_of(home / "killed")] == list(range(1, 161))
    assert not list((home / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("kind", sorted(tt.methods()))
def test_every_method_resumes_bitwise(home: Path, kind: str) -> None:
    """Nothing is measured on the way: that measures are taken up again is shown with the ways of feeding."""
    options = {
        "method": method_of(kind), "checkpoint__every": 1, "steps": 8, "data__held_out": None,
        "eval__every": None, "eval__samples": 0, "eval__forgetting": False,
    }  # fmt: skip
    whole = go(kit.recipe(home, "whole", **options))
    assert kill_and_resume(kit.recipe(home, "killed", **options), 2, 12, seed=7) >= 1
    assert_same(whole.folder, home / "killed")


@pytest.mark.parametrize(
    "options",
    [
        {"data__stream": True, "steps": 16},
        {"batch": {"tokens": 120}},
        {"data__mix": [{"path": "{home}/held.jsonl", "weight": 1.5}], "data__held_out": None},
        {"data__held_out": None, "data__fraction": 0.3, "checkpoint__final": "best"},
    ],
    ids=["stream", "tokens", "mix", "split"],
)
def test_every_way_of_feeding_resumes_bitwise(home: Path, options: dict[str, Any]) -> None:
    for source in options.get("data__mix", ()):
        source["path"] = source["path"].format(home=home)
    options = {"checkpoint__every": 1, "eval__every": 4, **options}
    if options.get("data__held_out", "") is None and "data__fraction" not in options:
        options["eval__every"] = None
    whole = go(kit.recipe(home, "whole", **options))
    assert kill_and_resume(kit.recipe(home, "killed", **options), 3, 8, seed=5) >= 1
    assert_same(whole.folder, home / "killed")
