"""Recipes: strict, with suggestions; YAML without traps; overrides before validation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trimtab.errors import ConfigError, UnknownNameError
from trimtab.optim.params import Memory
from trimtab.train.recipe import Recipe, differences
from trimtab.train.recipe_file import load_yaml, make_recipe, read_recipe, write_recipe

SMALL = {"model": "m", "data": {"path": "d.jsonl"}}


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    recipe = make_recipe(SMALL)
    assert recipe.batch.examples == 16
    assert recipe.optim.schedule == "constant"
    write_recipe(recipe, tmp_path / "r.yaml")
    assert read_recipe(tmp_path / "r.yaml") == recipe
    assert set(yaml.safe_load((tmp_path / "r.yaml").read_text())) == set(Recipe.model_fields)


def test_overrides_come_before_validation() -> None:
    recipe = make_recipe(
        {"model": "m", "data": {"path": 3}, "optim": None},
        ["data.path=d.jsonl", "optim.lr=2e-4", "batch.tokens=512", "eval.metric=choice", "name=x"],
    )
    assert recipe.data.path == "d.jsonl"
    assert recipe.optim.lr == 2e-4
    assert recipe.batch.tokens == 512
    assert recipe.name == "x"


def test_parts_of_a_method_written_as_text() -> None:
    recipe = make_recipe({**SMALL, "method": "lora(rank=16)"}, ["method.alpha=8"])
    assert recipe.method == {"kind": "lora", "rank": 16, "alpha": 8}


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({**SMALL, "epoch": 2}, [], "unknown option 'epoch'. Did you mean 'epochs'"),
        ({**SMALL, "optim": {"lrr": 1}}, [], "unknown option 'optim.lrr'. Did you mean 'lr'"),
        (SMALL, ["optm.lr=1"], "unknown option 'optm'. Did you mean 'optim'"),
        (SMALL, ["data.to_long=drop"], "unknown option 'data.to_long'. Did you mean 'too_long'"),
    ],
)
def test_unknown_options_are_refused_with_a_suggestion(
    values: dict, overrides: list[str], message: str
) -> None:
    with pytest.raises(UnknownNameError) as caught:
        make_recipe(values, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"model": "m"}, [], "data: Field required"),
        (SMALL, ["seed.x=1"], "seed: Input should be a valid integer"),
        ({**SMALL, "seed": 1}, ["seed.x=1"], "'seed' is a value, not a group"),
        (SMALL, ["epochs"], "write option=value"),
        (SMALL, ["optim.lr=-1"], "optim.lr: Input should be greater than 0 (got -1)"),
        (SMALL, ["data.held_out=h.jsonl", "data.fraction=0.1"], "held_out or fraction, not both"),
        (SMALL, ["loss.label_smoothing=1"], "loss.label_smoothing: Input should be less than 1"),
        (SMALL, ["batch.size=4", "batch.tokens=100"], "not both"),
        (SMALL, ["eval.metric=chioce"], "eval.metric"),
        (SMALL, ["optim.lr=[1"], "override optim.lr is not YAML"),
    ],
)
def test_values_that_do_not_fit(values: dict, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe(values, overrides)
    assert message in str(caught.value)


def test_yaml_without_its_traps() -> None:
    assert load_yaml("a: 1e-4\nb: 2E3\nc: 1.5e-3\nd: e4", where="t") == {
        "a": 1e-4,
        "b": 2e3,
        "c": 1.5e-3,
        "d": "e4",
    }
    with pytest.raises(ConfigError, match="'a' occurs twice"):
        load_yaml("a: 1\na: 2", where="t")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_recipe(tmp_path / "missing.yaml")
    for text in ("", "- a\n", "plain"):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ConfigError, match="a recipe is a mapping"):
            read_recipe(tmp_path / "r.yaml")


def test_differences_that_matter() -> None:
    one = make_recipe(SMALL)
    assert (
        differences(one, make_recipe(SMALL, ["out=x", "eval.every=3", "data.path=moved.jsonl"]))
        == []
    )
    assert differences(one, make_recipe(SMALL, ["optim.lr=1", "method.rank=3"])) == [
        "method",
        "method.kind",
        "method.rank",
        "optim.lr",
    ]


def test_no_torch_for_a_recipe() -> None:
    code = (
        "import sys; from trimtab.train.recipe_file import make_recipe;"
        "make_recipe({'model': 'm', 'data': {'path': 'd'}}, ['optim.lr=1e-4']);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_memory_changes_nothing_that_is_computed() -> None:
    recipe = make_recipe({"model": "m", "data": {"path": "d"}}, {"memory.recompute": "mlp"})
    assert recipe.memory.recompute == "mlp"
    assert differences(recipe, recipe.replace(memory=Memory())) == []
    with pytest.raises(ConfigError, match="memory.recompute"):
        make_recipe({"model": "m", "data": {"path": "d"}}, {"memory.recompute": "mlps"})
