"""The benchmark of many adapters, tiny: both sides load the same, and the report has what it promises."""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import core, many_adapters, many_sides, worker
from benchmarks.core import Sample, Side, Spread

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip


class Here:
    """A side without a process of its own."""

    def __init__(self, side: Side, allocator: str, threads: int) -> None:
        module, _, name = side.target.partition(":")
        self.side = side
        self._made = getattr(import_module(module), name)(**side.options)

    def call(self, method: str, *args: Any) -> Any:
        return worker.answer(self._made, {"call": method, "args": args})["result"]

    def step(self, number: int) -> Sample:
        found = worker.answer(self._made, {"call": "step", "args": [number]})
        return Sample(side=self.side.name, step=number, **found)

    def close(self) -> None:
        pass


def test_it_measures_by_turns_and_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "Worker", Here)
    options = ["--tiny", "--parts", "load", "--counts", "1", "3", "--bearable", "1", "--rows", "1"]
    with warnings.catch_warnings():
        assert command.main(["many_adapters", *options, "--out", str(tmp_path)]) == 0
    load = json.loads((tmp_path / "many_adapters.json").read_text("utf-8"))["parts"]["load"]
    assert load["faster"]["median"] > 0 and set(load["ours"]) == {"1", "3"}
    assert 0 < load["ours"]["3"]["read"]["median"] < load["ours"]["3"]["load"]["median"]
    assert "The n-th load from disk" in (tmp_path / "many_adapters.md").read_text("utf-8")


def test_its_sides_hold_and_answer(tmp_path: Path) -> None:
    many_sides.save_adapters(tmp_path, 4, SMALL)
    ours = many_sides.Ours(str(tmp_path), SMALL, active=2)
    assert ours.grow(4) > 0
    assert len({ours.cold(number)["said"] for number in range(4)}) == 4
    assert len(ours.decode(2, 4, 3)) == 3
    found = many_sides.Held(SMALL).put(3)
    assert found["values"] > 0 and found["before"] > 0
    lines = many_adapters.tables(
        {
            "memory": {"adapters": 3, "beyond_base": 5e6, "values": 4e6},
            "decode": {"rows": 2, "past": 4, "seconds": {"2": Spread(0.1, 0.1, 0.2)}},
        }
    )
    assert "3 adapters: 5.0 MB resident beyond the base, of which 4.0 MB are their values." in lines
    assert "| 2 | 100.0 (100.0 … 200.0) |" in lines


@pytest.mark.slow
def test_a_thousand_adapters_fit_into_host_memory() -> None:
    """LoRA of rank 8 on queries and values of a model of SmolLM2's shape: 921.6 MB of values in bf16."""
    found = many_sides.Held({}).put(1000)
    assert found["values"] == 1000 * 921_600
    assert found["after"] - found["before"] <= 1.2e9
