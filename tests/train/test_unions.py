"""Unions and gates in recipes: text, list or mapping; and resuming them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

import trimtab as tt
from tests.train import kit
from tests.train.kit import at_step, go, steps_of
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.parse import method_from
from trimtab.errors import ConfigError
from trimtab.train.recipe_file import make_recipe

UNION = "lora(rank=2, dropout=0.1)|prefix(length=2)"


@pytest.mark.parametrize(
    "method",
    [UNION, UNION.split("|"), tt.method(UNION).to_dict(), "adafit(inner=lora(rank=2), width=4)|bitfit",
     "spottune(inner=lora(rank=2), hidden=4, blocks=1, layer_drop=true)"],
)  # fmt: skip
def test_a_recipe_trains_it_and_an_interrupted_one_resumes_bitwise(home: Path, method: Any) -> None:
    options = {"method": method, "epochs": 1, "optim__lr": None}
    straight = go(kit.recipe(home, "straight", **options))
    recipe = kit.recipe(home, "broken", **options)
    with at_step(4, lambda run: signal.raise_signal(signal.SIGINT)):
        assert go(recipe).status == "interrupted"
    done = go(recipe, resume=True)
    adapter = Adapter.load(done.folder / "adapter")
    assert adapter == Adapter.load(straight.folder / "adapter")
    assert adapter.method == (tt.method(method) if isinstance(method, str) else tt.method(UNION))
    assert steps_of(done.folder) == steps_of(straight.folder)
    written = yaml.safe_load((done.folder / "recipe.yaml").read_text())
    assert written["optim"]["lr"] == adapter.method.default_lr


def test_an_option_of_what_is_inside_can_be_overridden() -> None:
    small = {"model": "m", "data": {"path": "d"}}
    recipe = make_recipe(
        {**small, "method": "spottune(inner=lora(rank=2))"}, ["method.inner.alpha=8"]
    )
    inner = {"kind": "lora", "rank": 2, "alpha": 8}
    assert recipe.method == {"kind": "spottune", "inner": inner}
    with pytest.raises(ConfigError, match="rank"):
        method_from(make_recipe({**small, "method": UNION}, ["method.rank=8"]).method)
