"""Forgetting in a run: what is measured, noted, and left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from tests.engine import kit as engine_kit
from tests.train import kit
from trimtab.adapt.adapter import Adapter
from trimtab.engine import Engine
from trimtab.errors import DataError
from trimtab.evals import Forgetting, forgetting, general_text, paragraphs
from trimtab.models.load import load
from trimtab.train.api import train_recipe
from trimtab.train.events import read_events
from trimtab.train.unrelated import Unrelated


def noted(folder: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == "forgetting"]


def test_it_is_measured_before_and_after_as_anyone_can_repeat(home: Path) -> None:
    done = train_recipe(kit.recipe(home, "run", eval__every=None), quiet=True)
    before, after = noted(done.folder)
    assert (before["of"], before["step"], after["of"], after["step"]) == ("base", 0, "adapter", 12)
    base = load(home / "model", dtype="float32")
    tt.attach(base.model, Adapter.load(done.folder / "adapter"))
    engine = Engine(base)
    data = paragraphs(general_text(), base.tokenizer, longest=128)
    old, new = (forgetting(engine, data, name) for name in (None, "default"))
    assert (Forgetting.of(before), Forgetting.of(after)) == (old, new)
    assert after["change"]["value"] == pytest.approx(new.change(old).value)
    assert after["change"]["value"] > 0  # a tiny random model learnt three words


def test_a_text_of_the_users_or_none(home: Path) -> None:
    (home / "mine.txt").write_text("you are fine today\n\nthe deep sea turns")
    text = str(home / "mine.txt")
    done = train_recipe(kit.recipe(home, "mine", eval__forgetting=text, steps=2), quiet=True)
    assert [(e["text"], len(e["sums"])) for e in noted(done.folder)] == [("mine.txt", 2)] * 2
    done = train_recipe(kit.recipe(home, "none", eval__forgetting=False, steps=2), quiet=True)
    assert noted(done.folder) == []
    with pytest.raises(DataError, match="cannot read the text to measure forgetting on"):
        train_recipe(kit.recipe(home, "lost", eval__forgetting="lost.txt"), quiet=True)
    assert not (home / "lost").exists()


def test_a_resumed_run_measures_the_base_once(home: Path) -> None:
    recipe = kit.recipe(home, "run", steps=4)
    train_recipe(recipe, quiet=True)
    train_recipe(recipe, resume=True, quiet=True)
    assert [e["of"] for e in noted(home / "run")].count("base") == 1


def test_a_model_that_is_not_causal_is_left_alone() -> None:
    base = engine_kit.base(engine_kit.bert())
    tt.attach(base.model, "lora(rank=2)", name="a")
    assert Unrelated(Engine(base), base.tokenizer, True, "a").measures is False
