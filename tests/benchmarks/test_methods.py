"""The table of methods: what is run and what is not run again, how rates are chosen, what the report says.

Runs are made up here; nothing is trained.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import methods, methods_table
from benchmarks.methods_benches import (
    MINILM,
    MOST_USED,
    REPLACED,
    SMOLLM2,
    Bench,
    Job,
    methods_of,
)
from benchmarks.scatter import Mark, scatter
from trimtab.evals.intervals import wilson

LOSSES = {1.0: 0.6, 3.0: 0.4, 10.0: 0.5, 30.0: 0.55}
ONLY = ("head only", "lora", "spottune")


class Made:
    """Numbers of runs without runs; ``refused`` methods raise a typed error, ``stops`` after so many jobs."""

    def __init__(self, refused: tuple[str, ...] = (), stops: int | None = None) -> None:
        self.refused, self.stops = refused, stops
        self.jobs: list[Job] = []

    def __call__(self, job: Job, bench: Bench) -> dict[str, Any]:
        if len(self.jobs) == self.stops:
            raise KeyboardInterrupt
        self.jobs.append(job)
        if job.name in self.refused:
            return {"error": "UnsupportedError: a | b\n does not work here."}
        right = 0.8 + 0.02 * job.seed
        return {
            "lr": 1e-3 * job.factor,
            "trained": 1000,
            "share": 0.01,
            "bytes": 2**20,
            "peak_bytes": 2**30,
            "training_loss": 0.3,
            "choosing_loss": LOSSES[job.factor],
            "loss": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 200},
            "accuracy": {"value": right, "low": 0.7, "high": 0.9, "count": 200},
            "forgetting": {},
            "drift": 0.97,
        }


def test_each_rate_then_the_best_with_another_seed(tmp_path: Path) -> None:
    made = Made()
    methods.run(tmp_path / "methods.json", MINILM, made, only=ONLY[:1])
    tried = [(1, 0), (3, 0), (10, 0), (30, 0), (3, 1)]
    assert [(job.factor, job.seed) for job in made.jobs] == tried
    assert {job.method for job in made.jobs} == {"full(targets=('head',))"}


def test_it_resumes_after_any_run(tmp_path: Path) -> None:
    path = tmp_path / "methods.json"
    with pytest.raises(KeyboardInterrupt):
        methods.run(path, MINILM, Made(stops=6), only=ONLY)
    assert len(json.loads(path.read_text())["minilm"]["runs"]) == 6
    made = Made(refused=("spottune",))
    methods.run(path, MINILM, made, only=ONLY)
    assert [(job.name, job.factor, job.seed) for job in made.jobs] == [
        ("lora", 3, 0), ("lora", 10, 0), ("lora", 30, 0), ("lora", 3, 1), ("spottune", 1, 0),
    ]  # fmt: skip
    again = Made()
    methods.run(path, MINILM, again, only=ONLY)
    assert again.jobs == []
    methods.run(path, MINILM, again, only=ONLY, retry=True)
    assert {job.name for job in again.jobs} == {"spottune"}
    assert len(again.jobs) == 5
    assert not path.with_suffix(".partial").exists()


def test_a_rate_that_fails_is_not_chosen(tmp_path: Path) -> None:
    class Diverges(Made):
        def __call__(self, job: Job, bench: Bench) -> dict[str, Any]:
            done = super().__call__(job, bench)
            return {"crash": "NonFiniteLossError: …"} if job.factor == 3 else done

    made = Diverges()
    found = methods.run(tmp_path / "m.json", MINILM, made, only=("lora",))
    tried = [(1, 0), (3, 0), (10, 0), (30, 0), (10, 1)]
    assert [(job.factor, job.seed) for job in made.jobs] == tried
    (row,) = methods_table.rows_of(found["minilm"])
    assert row["rate"] == "0.01 (×10)"


def test_rates_that_are_added_are_run_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    fewer = Bench(**{**vars(MINILM), "factors": (10.0, 30.0)})
    found = methods.run(path, fewer, Made(), only=("lora",))
    (row,) = methods_table.rows_of(found["minilm"])
    assert row["rate"] == "0.01 (×10, lowest)"
    more = Made()
    methods.run(path, MINILM, more, only=("lora",))
    assert [(job.factor, job.seed) for job in more.jobs] == [(1, 0), (3, 0), (3, 1)]


def test_runs_at_a_time_are_the_same_runs(tmp_path: Path) -> None:
    one = methods.run(tmp_path / "one.json", MINILM, Made(), only=ONLY)["minilm"]["runs"]
    two = methods.run(tmp_path / "two.json", MINILM, Made(), only=ONLY, workers=2)["minilm"]["runs"]

    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["name"], run["seed"], run["factor"]

    assert sorted(one, key=key) == sorted(two, key=key)
    assert json.loads((tmp_path / "two.json").read_text())["minilm"]["runs"] == two


def test_speed_stands_beside_that_of_full_fine_tuning(tmp_path: Path) -> None:
    found = methods.run(tmp_path / "m.json", MINILM, Made(), only=("full fine-tuning", "lora"))
    assert "| – | 1.00 GiB |" in "\n".join(methods_table.section(found["minilm"]))
    found["minilm"]["speed"] = {"full fine-tuning": [10.0, 20.0, 40.0], "lora": [15.0, 30.0, 80.0]}
    assert "| 30 (×1.50) | 1.00 GiB |" in "\n".join(methods_table.section(found["minilm"]))


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    methods.run(path, MINILM, Made(), only=("lora",))
    smaller = Bench(**{**vars(MINILM), "rows": (8, 8, 8)})
    with pytest.raises(SystemExit, match="other settings of minilm"):
        methods.run(path, smaller, Made(), only=("lora",))
    with pytest.raises(SystemExit, match="no method 'lor'"):
        methods.run(path, MINILM, Made(), only=("lor",))


def test_all_methods_of_the_registry_are_in_it() -> None:
    import trimtab as tt

    known = methods_of(MINILM)
    assert set(tt.methods()) - set(REPLACED) <= known.keys()
    assert {"head only", "full fine-tuning", "houlsby"} <= known.keys()
    assert next(iter(known)) == "full fine-tuning"
    assert tuple(methods_of(SMOLLM2)) == MOST_USED
    for bench in (MINILM, SMOLLM2):
        assert len(bench.factors) >= 3
        assert json.loads(json.dumps(bench.settings())) == bench.settings()


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    found = methods.run(tmp_path / "m.json", MINILM, Made(refused=("spottune",)), only=ONLY)
    methods_table.write(tmp_path, found)
    text = (tmp_path / "methods.md").read_text()
    known = wilson(162, 200)  # the mean of 0.80 and 0.82
    assert (
        f"| lora | 0.810 [{known.low:.3f}, {known.high:.3f}] | 0.020 | 0.5000 | +0.2000 |" in text
    )
    assert "| 1.00 MiB | – | 1.00 GiB | 0.970 | 0.003 (×3) |" in text
    assert "- spottune: UnsupportedError: a \\| b does not work here." in text
    assert "× 1, 3, 10, 30" in text
    picture = ElementTree.fromstring((tmp_path / "methods-minilm.svg").read_text())
    words = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"head only", "lora"} <= set(words)
    assert "spottune" not in words


def test_perplexity_of_a_generator(tmp_path: Path) -> None:
    class Generator(Made):
        def __call__(self, job: Job, bench: Bench) -> dict[str, Any]:
            done = super().__call__(Job(job.bench, job.name, job.method, 1.0, job.seed), bench)
            del done["drift"]
            return {**done, "forgetting": {"base": 3.0, "adapter": 3.1}}

    found = methods.run(tmp_path / "m.json", SMOLLM2, Generator(), only=("lora",))
    text = "\n".join(methods_table.section(found["smollm2"]))
    assert "| 20.09 → 22.20 |" in text
    assert "perplexity before → after" in text


def test_names_in_a_picture_do_not_cover_each_other() -> None:
    marks = [Mark(f"method {n}", 1000 + n, 0.8 + n / 1000, 0.7, 0.9, 30) for n in range(12)]
    picture = ElementTree.fromstring(
        scatter(marks, above="a", below="b", room=150, size=(900, 600))
    )
    names = [
        node
        for node in picture.iter("{http://www.w3.org/2000/svg}text")
        if str(node.text).startswith("method")
    ]
    heights = sorted(float(node.attrib["y"]) for node in names)
    assert len(heights) == 12
    assert all(b - a >= 13 for a, b in pairwise(heights))
