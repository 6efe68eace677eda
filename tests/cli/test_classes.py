"""`trimtab train`, `data preview` and `eval` of a sequence classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.data.kit import write_jsonl
from tests.train.test_classes import encoder, rows

TASK = "task: sequence-classification"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    encoder(folder / "bert")
    write_jsonl(folder / "train.jsonl", rows(24))
    write_jsonl(folder / "held.jsonl", rows(8, seed=1))
    (folder / "r.yaml").write_text(
        f"model: bert\n{TASK}\ndata: {{path: train.jsonl, held_out: held.jsonl}}\nmethod: bitfit\n"
        "dtype: float32\nepochs: 2\neval: {metric: f1}\nout: run\n"
    )
    return folder


def test_from_a_recipe_to_a_table_by_class(run: Ran, home: Path) -> None:
    code, out, _ = run("data", "preview", "r.yaml", "--rows", 1)
    assert code == 0
    assert "⟦good⟧" in out or "⟦bad⟧" in out
    code, out, _ = run("train", "r.yaml")
    assert code == 0
    assert "text accuracy" in out
    code, out, err = run("eval", "run", "--out", "e.json")
    assert code == 0, err
    assert "said good" in out
    assert "text accuracy" in out
    found = json.loads((home / "e.json").read_text())
    assert {"f1_macro", "f1_micro"} <= found["results"][1]["metrics"].keys()
    code, out, err = run(
        "eval", "-m", "bert", "-a", "run/adapter", "-d", "held.jsonl", "--metric", "choice",
        "task=sequence-classification", "--no-base", "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    assert "choice" in out
