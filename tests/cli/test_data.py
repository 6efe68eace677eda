"""``trimtab data`` and ``trimtab recipe``: looking before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cli.conftest import Ran
from tests.data.kit import write_jsonl
from trimtab.train.recipe_file import make_recipe, read_recipe


@pytest.fixture
def home(home: Path, tmp_path: Path) -> Path:
    """The same, to write into."""
    for name in ("train.jsonl", "held.jsonl"):
        shutil.copy(home / name, tmp_path / name)
    (tmp_path / "model").symlink_to(home / "model")
    return tmp_path


GOOD = [{"prompt": f"one {number}", "completion": "two"} for number in range(6)]


def test_stats_count_and_draw(run: Ran) -> None:
    code, out, _ = run("data", "stats", "train.jsonl", "--model", "model")
    assert code == 0
    assert "16 rows of prompt/completion: 16 used." in out
    assert "16 documents" in out
    counts = [int(line.rsplit(" ", 1)[1]) for line in out.splitlines() if " tokens  " in line]
    assert sum(counts) == 16
    assert "█" in out


def test_check_lists_bad_rows_repeats_and_leaks(run: Ran, home: Path) -> None:
    again = {"prompt": "ONE  2", "completion": "two"}
    bad = [*GOOD, "{", {"prompt": "a"}, again, {"prompt": "", "completion": "b"}]
    write_jsonl(home / "bad.jsonl", bad)
    write_jsonl(home / "other.jsonl", [GOOD[4], {"prompt": "new", "completion": "two"}])
    code, out, _ = run("data", "check", "bad.jsonl", "--held-out", "other.jsonl")
    assert code == 1
    assert "10 rows of prompt/completion: 7 used, 3 dropped (3 malformed)" in out
    for origin in (
        "bad.jsonl:7: broken JSON",
        "bad.jsonl:8: ",
        "bad.jsonl:10: the prompt is empty",
    ):
        assert origin in out
    assert "bad.jsonl:9 says the same as bad.jsonl:3" in out
    assert "1 held-out examples that are trained on as well" in out
    assert "other.jsonl:1" in out


def test_check_of_tokens_needs_a_model(run: Ran, home: Path) -> None:
    write_jsonl(home / "long.jsonl", [*GOOD, {"prompt": "word " * 90, "completion": "x"}])
    assert run("data", "check", "long.jsonl")[0] == 0
    code, out, _ = run("data", "check", "long.jsonl", "max_tokens=60", "--model", "model")
    assert code == 1
    assert "more than the context of 60" in out


def test_a_recipe_names_its_own_data(run: Ran, home: Path) -> None:
    recipe = {"model": "model", "data": {"path": "train.jsonl", "held_out": "held.jsonl"}}
    (home / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, out, _ = run("data", "check", "r.yaml")
    assert (code, out.count("no bad rows")) == (0, 2)
    assert "16 documents" in run("data", "stats", "r.yaml")[1]


ROWS = {
    "chat": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ],
    "classify": [{"text": "fine day", "label": "good"}, {"text": "rain", "label": "bad: wet"}],
    "label": [{"text": "fine day", "label": "good"}, {"text": "rain", "label": "bad: wet"}],
    "text": [{"text": "Once upon a time."}],
    "extract": [{"prompt": "Ann, 31", "completion": '{"name": "Ann"}'}],
    "style": [{"prompt": "Hello", "completion": "Ahoy!"}],
}


@pytest.mark.parametrize("task", ROWS)
def test_init_writes_a_commented_recipe_that_is_valid(run: Ran, home: Path, task: str) -> None:
    write_jsonl(home / "d.jsonl", ROWS[task])
    chosen = [] if task in ("chat", "classify", "text") else ["--task", task]
    code, out, _ = run("recipe", "init", "-m", "model", "-d", "d.jsonl", *chosen)
    assert code == 0
    assert f"a recipe for {task}" in out
    text = (home / "recipe.yaml").read_text()
    recipe = read_recipe(home / "recipe.yaml")
    assert (recipe.model, recipe.data.path) == ("model", "d.jsonl")
    if task == "classify":
        assert recipe.data.labels == ("bad: wet", "good")
        assert "{text}" in str(recipe.data.instruction)
    if task == "label":
        assert (recipe.task, recipe.data.instruction) == ("sequence-classification", None)
        assert recipe.data.labels == ("bad: wet", "good")
        write_jsonl(home / "d.jsonl", ROWS["text"])
        code, _, err = run("recipe", "init", "-m", "m", "-d", "d.jsonl", "-t", task, "-o", "-")
        assert (code, "the task 'label' is for labelled texts" in err) == (2, True)
    # Every option is there, with its words; and those that are comments are valid when they are not.
    assert "# Peak learning rate" in text
    options = [line.removeprefix("# ") for line in text.splitlines() if ":" in line]
    assert {"seed: 0", "device: null"} <= set(options)
    assert run("recipe", "init", "-m", "model", "-d", "d.jsonl")[0] == 2  # nothing is overwritten
    assert run("recipe", "check", "recipe.yaml", "seed=3")[1].count("\nseed: 3\n") == 1


def test_tasks_are_listed(run: Ran) -> None:
    out = run("recipe", "tasks")[1]
    assert [line.split()[0] for line in out.splitlines()] == sorted(ROWS)


def test_the_schema_accepts_what_the_recipe_does_and_refuses_what_it_refuses(run: Ran) -> None:
    schema = json.loads(run("recipe", "schema")[1])
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"model": "m", "data": {"path": "d"}, "optim": {"lr": 1e-4, "schedule": "wsd"}}
    jsonschema.validate(good, schema)
    make_recipe(good)
    for wrong in ({"modl": "m"}, {"optim": {"lr": "high"}}, {"optim": {"schedule": "cosin"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, **wrong}, schema)
    described = schema["$defs"]["OptimRecipe"]["properties"]
    assert all(option.get("description") for option in described.values())
