"""``trimtab sweep``: a table, a picture, and the best adapter."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.train.kit import at_joined_step
from trimtab.adapt.adapter import Adapter

RECIPE = """
model: model
data: {path: train.jsonl, held_out: held.jsonl}
method: lora(rank=2)
dtype: float32
batch: {size: 4}
epochs: 2
eval: {forgetting: false, samples: 0}
"""


@pytest.fixture
def recipe(home: Path) -> str:
    (home / "recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def test_a_grid_its_table_and_what_it_leaves(run: Ran, home: Path, recipe: str) -> None:
    axes = ("optim.lr=[1e-3,1e-2]", "method.rank=[2,4]", "optim.schedule=cosine")
    code, out, _ = run("sweep", recipe, *axes, "--out", "rates")
    assert code == 0
    said = " ".join(out.split())
    assert "4: optim.lr=0.001 method.rank=2; optim.lr=0.001 method.rank=4;" in said
    assert "8 of each variant; 2 go on after step 2; 1 go on after step 4" in said
    assert "at most 16 steps" in said
    bytes_ = re.search(r"([\d,]+) trained parameters of 4 adapters take ([\d.]+) KiB", said)
    assert bytes_ is not None
    count = int(bytes_[1].replace(",", ""))
    assert float(bytes_[2]) == pytest.approx(16 * count / 1024, rel=1e-2)
    assert "2 of 4 go on; best so far: optim.lr=0.01" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    winner = next(row for row in rows if row and row[-1] == "winner")
    assert winner[4] == "8"
    record = json.loads((home / "rates" / "sweep.json").read_text())
    assert record["winner"] == int(winner[0])
    kept = Adapter.load(home / "rates" / "adapter")
    assert kept == Adapter.load(home / f"rates/variants/{int(winner[0]):03d}/adapter")
    assert kept.method.to_dict()["rank"] == int(winner[2])
    page = (home / "rates" / "report.html").read_text()
    assert page.count("<tr") == 5 and "<svg" in page and "src=" not in page
    code, again, _ = run("sweep", "rates", "--resume", "--json")
    found = json.loads(again)
    assert found["winner"] == record["winner"] and len(found["variants"]) == 4
    assert code == 0
    code, out, _ = run("eval", "rates", "--no-base")  # the folder is a run's
    assert code == 0 and "6 used" in out and "95 % intervals" in out


def test_chance_draws_and_decides(run: Ran, home: Path, recipe: str) -> None:
    ranges = ("optim.lr=log(1e-4,1e-2)", "optim.warmup=uniform(0,0.5)")
    code, out, _ = run(
        "sweep", recipe, *ranges, "--random", 3, "--seed", 5, "-o", "drawn", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert [entry["status"] for entry in found["variants"]] == ["finished", "stopped", "stopped"]
    assert all(1e-4 <= entry["choice"]["optim.lr"] <= 1e-2 for entry in found["variants"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optim.lrr=[1,2]",), "recipe.yaml: unknown option 'optim.lrr'. Did you mean 'lr'?"),
        (("optim.lr=[]",), "optim.lr has an empty list"),
        (("optim.lr=[1e-4]",), "optim.lr lists one value"),
        (("seed=[1,2]", "seed=[3,4]"), "seed is given twice"),
        ((), "nothing varies"),
        (("optim.lr=log(1e-4,1e-2)",), "add --random N"),
        (("seed=[1,2]", "--sampler", "random"), "--random N"),
        (("model=[model,other]",), "cannot vary model"),
        (("seed=[1,2]", "--out", "train.jsonl"), "is a file"),
        (("seed=[1,2]", "--resume"), "name its folder"),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Ran, recipe: str, arguments: tuple[str, ...], said: str
) -> None:
    code, _, error = run("sweep", recipe, *arguments)
    assert code == 2
    assert said in error and error.count("\n") == 1


def test_a_folder_is_resumed_as_it_is(run: Ran, home: Path) -> None:
    (home / "empty").mkdir(exist_ok=True)
    assert "give --resume and nothing else" in run("sweep", "empty", "seed=[1,2]")[2]
    assert "holds no sweep" in run("sweep", "empty", "--resume")[2]


def test_ctrl_c_is_an_exit_code_and_the_same_command_goes_on(
    run: Ran, home: Path, recipe: str
) -> None:
    command = ("sweep", recipe, "optim.lr=[1e-3,1e-2]", "out=stopped")
    with at_joined_step(3, lambda: signal.raise_signal(signal.SIGINT)):
        code, out, _ = run(*command)
    assert code == 130
    assert "the same command with --resume goes on" in out and "3 of 8" in out
    assert not (home / "stopped" / "adapter").exists()
    code, out, _ = run(*command, "--resume")
    assert code == 0 and "winner" in out
