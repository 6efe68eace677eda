"""The three jobs run as they are written, on a few of their own rows and with the real model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recipes import assets
from recipes.jobs import data
from trimtab.train.api import train_recipe
from trimtab.train.recipe_file import read_recipe

ROOT = Path(__file__).parent.parent.parent
FEW = 6


def few(path: Path, folder: Path) -> Path:
    """A few rows of a data file, in a file of the same kind."""
    out = folder / path.name
    match path.suffix:
        case ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            short = [row for row in rows if len(str(row)) < 300]
            out.write_text(json.dumps(short[: 5 * FEW]), encoding="utf-8")
        case ".csv":
            with path.open(encoding="utf-8", newline="") as file, out.open("w", newline="") as new:
                csv.writer(new).writerows(list(csv.reader(file))[: FEW + 1])
        case ".parquet":
            rows = pq.read_table(path)  # sorted by topic
            pq.write_table(rows.take(list(range(0, len(rows), len(rows) // FEW))), out)
    return out


@pytest.mark.parametrize("job", ["instructions", "sentiment", "topics"])
def test_a_job_goes_from_its_file_to_a_report(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        getattr(data, job)()
        model = assets.smollm2()
    except assets.UnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(ROOT)  # where its map function is found from
    path = ROOT / "recipes" / "jobs" / f"{job}.yaml"
    written = read_recipe(path)
    names = [Path(written.data.path).name]
    options = [f"model={model}", "steps=2", "batch.size=2", "eval.forgetting=false"]
    options += ["eval.samples=1", "eval.every=1", "eval.max_tokens=3", f"out={tmp_path / 'run'}"]
    options.append(f"data.path={few(data.folder() / names[0], tmp_path)}")
    if isinstance(written.data.held_out, str):
        name = Path(written.data.held_out).name
        options.append(f"data.held_out={few(data.folder() / name, tmp_path)}")
    done = train_recipe(read_recipe(path, options), quiet=True)
    assert done.status == "finished" and done.after is not None
    assert (done.after.answers is not None) == (job != "instructions")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Before and after" in page and "<mark>" in page


def test_held_out_topics_are_not_trained_on() -> None:
    try:
        data.topics()
    except assets.UnavailableError as error:
        pytest.skip(str(error))
    sides = [
        {assets.normal(text) for text in pq.read_table(data.folder() / name)["text"].to_pylist()}
        for name in ("topics.parquet", "topics_held_out.parquet")
    ]
    assert len(sides[0]) == 600 and len(sides[1]) == 300
    assert not sides[0] & sides[1]
