"""The benchmark of many adapters, tiny: both sides load the same, and the report has what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import many_sides


def test_it_measures_and_writes_a_report(tmp_path: Path) -> None:
    options = [
        "--tiny",
        "--counts",
        "1",
        "4",
        "--bearable",
        "2",
        "--rows",
        "3",
        "--past",
        "4",
        "--steps",
        "1",
    ]
    options += ["--threads", "1", "--out", str(tmp_path)]
    assert command.main(["many_adapters", *options]) == 0
    parts = json.loads((tmp_path / "many_adapters.json").read_text("utf-8"))["parts"]
    memory, load = parts["memory"], parts["load"]
    assert memory["adapters"] == 4 and memory["values"] > 0
    assert load["faster"]["median"] > 0 and set(load["ours"]) == {"1", "4"}
    assert 0 < load["ours"]["4"]["read"]["median"] < load["ours"]["4"]["load"]["median"]
    assert set(parts["decode"]["seconds"]) == {"1", "4"}
    table = (tmp_path / "many_adapters.md").read_text("utf-8")
    for words in (
        "resident beyond the base",
        "The n-th load from disk",
        "A token for each of 3 rows",
    ):
        assert words in table


@pytest.mark.slow
def test_a_thousand_adapters_fit_into_host_memory() -> None:
    """LoRA of rank 8 on queries and values of a model of SmolLM2's shape: 921.6 MB of values in bf16."""
    found = many_sides.Held({}).put(1000)
    assert found["values"] == 1000 * 921_600
    assert found["after"] - found["before"] <= 1.2e9
