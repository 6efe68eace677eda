"""Trackers: each tool is written to for real, and read back with its own reader."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.train import kit
from trimtab.errors import ConfigError, MissingPackageError, UnknownNameError
from trimtab.train.api import train_recipe
from trimtab.train.course import Course
from trimtab.train.events import Events, read_events
from trimtab.train.trackers import Metrics, Started, Tracked, Tracker, Trackers, trackers

INTERVAL = {"low": 0.0, "high": 9.0, "count": 3}


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "step": number, "loss": loss, "accuracy": 0.5, "lr": 1e-3, "grad_norm": 2.0,
        "tokens": 100 * number, "seconds": 0.5, "epoch": 0,
    }  # fmt: skip


def evaluation(number: int, loss: float) -> dict[str, Any]:
    both = {"value": loss, **INTERVAL}
    return {"step": number, "of": "adapter", "loss": both, "accuracy": both, "answers": None}


def first_part(folder: Path, tracker: str) -> None:
    """Six steps, then the process is gone without a word."""
    folder.mkdir()
    events = Events(folder / "events.jsonl")
    Trackers([tracker]).follow(events, {"optim": {"lr": 1e-3}}, pytest.fail)
    events.add("start", {"plan": []})
    for number in range(1, 7):
        events.add("step", step(number, 1 / number))
    events.add("eval", evaluation(6, 0.6))
    events.add("interrupted", {"step": 6})
    events.close()


def second_part(folder: Path, tracker: str) -> None:
    """It goes on after step 4, with what it would have noted anyway."""
    events = Events(folder / "events.jsonl")
    events.add("resume", {"step": 4})
    Trackers([tracker]).follow(events, {"optim": {"lr": 1e-3}}, pytest.fail)
    for number in range(5, 9):
        events.add("step", step(number, 1 / number))
        if number == 6:
            events.add("eval", evaluation(6, 0.6))
    events.add("end", {"step": 8, "tokens": 800, "peak_bytes": 12345})
    events.close()


def wanted(folder: Path) -> dict[str, dict[int, float]]:
    """Every metric by step, from the events that count."""
    metrics, found = Metrics(), dict[str, dict[int, float]]()
    for event in read_events(folder / "events.jsonl"):
        point = metrics.of(event)
        for name, value in {} if point is None else point.values.items():
            found.setdefault(name, {})[event["step"]] = value
    assert list(found["train/loss"]) == list(range(1, 9))
    assert found["train/tokens_per_second"] == dict.fromkeys(range(1, 9), 200.0)
    assert found["eval/loss"] == {6: 0.6}
    return found


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every metric by step, as TensorBoard reads them; no step may be there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    found = {}
    for name in read.Tags()["scalars"]:
        points = [(event.step, event.value) for event in read.Scalars(name)]
        found[name] = dict(points)
        assert len(found[name]) == len(points), name
    return found


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    first_part(folder, "tensorboard")
    second_part(folder, "tensorboard")
    got, expected = scalars(folder / "tensorboard"), wanted(folder)
    assert got.keys() == expected.keys()
    for name, points in expected.items():
        assert got[name] == pytest.approx(points), name


@pytest.mark.filterwarnings("default")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "run"
    first_part(folder, "mlflow")
    client = MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "trimtab"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("KILLED", "run")
    assert run.data.params == {"optim.lr": "0.001"}
    second_part(folder, "mlflow")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    expected = wanted(folder)
    assert run.data.metrics.keys() == expected.keys()
    for name, points in expected.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == list(points.items()), name


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """All rows of an offline run: a LevelDB log of W&B's own protocol messages, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    data, at, rows, whole = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end is padded
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (2, 3):  # the first or a middle part of a record
            continue
        record = wandb_internal_pb2.Record.FromString(whole)
        whole = b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    folder = tmp_path / "run"
    first_part(folder, "wandb")
    one = json.loads((folder / "trackers.json").read_text())["wandb"]
    second_part(folder, "wandb")
    parts = sorted((folder / "wandb").glob("offline-run-*"), key=lambda part: part.stat().st_ctime)
    assert len(parts) == 2
    assert all(part.name.endswith(one) for part in parts)
    rows = [row for part in parts for row in wandb_history(part)]
    expected = wanted(folder)
    for name, points in expected.items():
        got = [(row["_step"], row[name]) for row in rows if name in row]
        assert got == list(points.items()), name


TRACKIO = """
import sys, json
from pathlib import Path
from tests.train.test_trackers import first_part, second_part
folder = Path(sys.argv[1])
first_part(folder, "trackio")
second_part(folder, "trackio")
from trackio.sqlite_storage import SQLiteStorage
name = json.loads((folder / "trackers.json").read_text())["trackio"]
print(json.dumps(SQLiteStorage.get_logs("trimtab", name), default=str))
"""


def test_trackio(tmp_path: Path) -> None:
    """In a process of its own: where Trackio keeps its data is settled when it is imported."""
    pytest.importorskip("trackio")
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(folder)],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)  # and it printed nothing else
    for name, points in wanted(folder).items():
        assert [(row["step"], row[name]) for row in rows if name in row] == list(points.items())


# -- any tool --------------------------------------------------------------------------------------


class Broken(Tracker):
    """A tool whose network is down."""

    kind: ClassVar[str] = "broken"
    told: ClassVar[list[str]] = []
    down: ClassVar[set[int]] = set()

    def start(self, run: Tracked) -> Started:
        if run.config.get("refuse"):
            raise OSError("no  key")
        return Started("1")

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        if step in self.down:
            raise ConnectionError("the line is dead")
        self.told.append(str(step))

    def finish(self, status: str) -> None:
        self.told.append(status)
        if self.down:
            raise ConnectionError("still dead")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    trackers.add("broken", Broken)
    monkeypatch.setattr(Broken, "told", [])
    monkeypatch.setattr(Broken, "down", set())
    yield Broken
    trackers.remove("broken")


def tracked(folder: Path, steps: int) -> list[str]:
    said: list[str] = []
    events = Events(folder / "events.jsonl")
    Trackers(["broken"]).follow(events, {}, said.append)
    for number in range(1, steps + 1):
        events.add("step", step(number))
    events.add("error", {"step": steps, "message": "the disk"})
    events.close()
    return said


def test_a_tool_that_fails_is_told_of_once_and_counted(tmp_path: Path, broken: Any) -> None:
    broken.down = {2, 4}
    said = tracked(tmp_path, 5)
    assert broken.told == ["1", "3", "5", "failed"]
    assert said == [
        "tracker broken failed at step 2: the line is dead. Training goes on.",
        "tracker broken: 3 times nothing was logged; events.jsonl has everything.",
    ]


def test_a_tool_that_goes_on_failing_is_given_up(tmp_path: Path, broken: Any) -> None:
    broken.down = {2, 3, 4}
    said = tracked(tmp_path, 6)
    assert broken.told == ["1", "failed"]
    assert "3 failures in a row, it is given up" in said[1]
    assert "6 times nothing was logged" in said[2]


def test_a_tool_that_does_not_start_stops_the_run_at_once(tmp_path: Path, broken: Any) -> None:
    events = Events(tmp_path / "events.jsonl")
    with pytest.raises(ConfigError, match=r"'broken' could not start: no key\. Mend that"):
        Trackers(["broken"]).follow(events, {"refuse": True}, pytest.fail)
    events.close()


def test_names_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="unknown tracker 'tensorbord'. Did you mean 'tens"):
        Trackers(["tensorbord"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'trimtab\[wandb\]'"):
        Trackers(["wandb"])
    assert isinstance(MissingPackageError("x"), ImportError)


def test_a_run_is_tracked_from_its_first_to_its_last_step(home: Path, broken: Any) -> None:
    recipe = kit.recipe(home, "run", track=["broken", "broken"], eval__samples=0)
    done = train_recipe(recipe, quiet=True)
    assert next(t for t in broken.told if t != "0") == "1"
    assert broken.told[-1] == "finished"
    assert {str(n) for n in range(1, 13)} < set(broken.told)
    assert json.loads((done.folder / "trackers.json").read_text()) == {"broken": "1"}


def test_an_interrupted_run_and_its_resumption_are_one_tracked_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    recipe = kit.recipe(home, "run", track=["tensorboard"], checkpoint__every=100)
    original = Course._step

    def step(self: Course, members: Any, cursor: Any, computed: Any) -> None:
        original(self, members, cursor, computed)
        if self.progress.step == 7:
            raise KeyboardInterrupt  # as a process that is killed: nothing is saved after step 4

    with monkeypatch.context() as patch:
        patch.setattr(Course, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train_recipe(recipe, quiet=True)
    train_recipe(recipe, resume=True, quiet=True)
    events = read_events(home / "run" / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "resume"] == [4]
    metrics = Metrics()
    points = [point for event in events if (point := metrics.of(event))]
    got = scalars(home / "run" / "tensorboard")
    assert got["train/loss"].keys() == set(range(1, 13))
    assert got.keys() == {name for point in points for name in point.values}
    for point in points:
        for name, value in point.values.items():
            assert got[name][point.step] == pytest.approx(value), (name, point.step)


def test_a_tool_that_does_not_exist_leaves_no_folder(home: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'mlflow'"):
        train_recipe(kit.recipe(home, "run", track=["mlfow"]), quiet=True)
    assert not (home / "run").exists()
