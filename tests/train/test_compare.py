"""Runs side by side."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.train.events_kit import evaluation, unrelated, write_run
from trimtab.cli import app
from trimtab.errors import ConfigError, FileFormatError
from trimtab.train.compare import Comparison

LOSSES = [1.0, 0.5, 0.25, 0.2]


def run(folder: Path, held: float, **options: Any) -> Path:
    return write_run(
        folder,
        LOSSES,
        ("eval", evaluation(0, 2.0)),
        ("eval", evaluation(4, held)),
        ("forgetting", unrelated(0, [20.0, 30.0])),
        ("forgetting", unrelated(4, [20.5, 30.5])),
        **options,
    )


def cells(comparison: Comparison, name: str) -> tuple[str, ...]:
    rows = [*comparison.rows, *comparison.differences]
    return next(row.cells for row in rows if row.name == name)


def test_the_table(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 0.5)
    two = run(tmp_path / "two", 0.4, recipe={"optim": {"lr": 2e-3}, "out": "x"})
    comparison = Comparison.of([one, two])
    assert comparison.names == ("one", "two")
    assert comparison.warnings == []
    assert cells(comparison, "held-out loss")[1] == "2.0000 → 0.4000 [0.3500, 0.4500]"
    assert cells(comparison, "perplexity of unrelated text")[0].startswith("+5.1 %")
    assert cells(comparison, "tokens a second") == ("200", "200")
    train = sum(LOSSES) / 4
    assert cells(comparison, "held-out minus training loss")[0] == f"{0.5 - train:+.4f}"
    assert [(row.name, row.cells) for row in comparison.differences] == [
        ("optim.lr", ("0.001", "0.002"))
    ]


def test_options_of_different_methods_are_not_set_against_each_other(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 0.5)
    ia3 = {"method": {"kind": "ia3", "targets": "all-linear"}, "seed": 3}
    two = run(tmp_path / "two", 0.5, recipe=ia3, begin={"plan": [["method", "ia3()"]]})
    comparison = Comparison.of([one, two])
    assert cells(comparison, "method") == ("lora(rank=2)", "ia3")
    assert [row.name for row in comparison.differences] == ["seed"]


def test_the_numbers_are_plain_json(tmp_path: Path) -> None:
    numbers = Comparison.of([run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.4)]).numbers()
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    second = numbers["runs"][1]
    assert second["metrics"]["held-out loss"]["after"]["value"] == 0.4
    assert math.expm1(second["forgetting"]["value"]) == pytest.approx(math.expm1(0.05))


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 0.5)
    other = run(tmp_path / "other", 0.5, begin={"held_out_sha256": "ef" * 32})
    assert "not measured on the same held-out examples" in Comparison.of([one, other]).warnings[0]
    short = run(tmp_path / "short", 0.5, finished=False)
    comparison = Comparison.of([one, short])
    assert comparison.warnings == [
        "short is not finished (step 4 of 4): what is measured at the end is missing."
    ]
    assert cells(comparison, "held-out loss")[1] == "2.0000 → –"
    page = comparison.write(tmp_path / "page.html").read_text()
    assert 'role="alert">short is not finished' in page


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [run(tmp_path / place / "run", 0.5) for place in ("a", "b")]
    assert Comparison.of(folders).names == ("a/run", "b/run")


def test_more_runs_than_colours(tmp_path: Path) -> None:
    folders = [run(tmp_path / f"run-{n}", 0.5 + n / 10) for n in range(10)]
    page = Comparison.of(folders).write(tmp_path / "page.html").read_text()
    lines = set(re.findall(r'<polyline class="line ([^"]+)"', page))
    assert len(lines) == 10
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match=r"there is no folder .*none; name"):
        Comparison.of([one, tmp_path / "none"])
    with pytest.raises(FileFormatError, match=r"empty holds no run that has started"):
        Comparison.of([one, tmp_path / "empty"])
    with pytest.raises(ConfigError, match="two runs or more"):
        Comparison.of([one])
    with pytest.raises(ConfigError, match="one is named twice"):
        Comparison.of([one, tmp_path / "empty" / ".." / "one"])
    (one / "recipe.yaml").unlink()
    with pytest.raises(FileFormatError, match=r"cannot read recipe\.yaml"):
        Comparison.of([one, run(tmp_path / "two", 0.5)])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    run(Path("one"), 0.5)
    run(Path("two"), 0.4, begin={"held_out_sha256": "ef" * 32})
    shown = CliRunner().invoke(app, ["compare", "one", "two"])
    assert shown.exit_code == 0
    for text in ("lora(rank=2)", "0.4000 [0.3500, 0.4500]", "careful: ", "page: compare.html"):
        assert text in shown.output, text
    assert Path("compare.html").exists()
    shown = CliRunner().invoke(app, ["compare", "one", "two", "--json", "--out", "other.html"])
    assert json.loads(shown.output)["runs"][0]["steps"] == 4
    assert Path("other.html").exists()
