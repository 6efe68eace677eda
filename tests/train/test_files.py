"""Events, checkpoints, charts: the small parts of a run."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import pytest

from trimtab.errors import FileFormatError, StorageError
from trimtab.train.chart import Series, kind_of, line_chart, nice_ticks, reach_of, smoothed, thinned
from trimtab.train.checkpoints import Checkpoints
from trimtab.train.events import Events, read_events
from trimtab.train.page import marked, numbered, sized, timed
from trimtab.train.report import write_report


def test_events_survive_a_torn_line_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = Events(path)
    for step in (1, 2, 3):
        events.add("step", {"step": step, "loss": math.nan if step == 2 else 1.0})
    events.close()
    path.write_bytes(path.read_bytes() + b'{"event": "step", "st')
    again = Events(path)
    again.add("resume", {"step": 2})
    again.add("step", {"step": 3, "loss": 0.5})
    again.close()
    found = read_events(path)
    assert [(e["event"], e["step"]) for e in found] == [
        ("step", 1), ("step", 2), ("resume", 2), ("step", 3)
    ]  # fmt: skip
    assert found[1]["loss"] == "nan"
    assert found[-1]["loss"] == 0.5
    assert read_events(tmp_path / "none.jsonl") == []


def test_a_full_disk_is_a_storage_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    events = Events(Path("/dev/full"))
    with pytest.raises(StorageError, match="No space left"):
        events.add("step", {})
    with suppress(StorageError):
        events.close()


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.last() is None
    for step in (3, 6, 9, 12):
        checkpoints.path(step).mkdir()
    (tmp_path / ".step-000015.abc").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoints.prune(best=3)
    assert checkpoints.steps() == [3, 9, 12]
    assert checkpoints.last() == 12
    assert not list(tmp_path.glob(".step-*"))
    assert (tmp_path / "notes").exists()


def test_charts() -> None:
    assert nice_ticks(0.0, 9.7) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert nice_ticks(1.0, 1.0)[0] < 1 < nice_ticks(1.0, 1.0)[-1]
    assert len(nice_ticks(1e-3, 1e-3 + 1e-18)) > 3
    assert smoothed([(1, 0.1), (2, 0.3)], 0) == [(1, 0.1), (2, 0.3)]
    assert smoothed([(1, 1.0), (2, 3.0), (3, 8.0)], 2) == [(1, 1.0), (2, 4.0), (3, 8.0)]
    assert line_chart([Series("a", "first", [])], x_name="x", y_name="y") == ""
    svg = line_chart(
        [Series("<a>", "first", [(0, 1.0), (10, 2.0)], marks=True)], x_name="x", y_name="y"
    )
    assert svg.count('class="dot first"') == 2
    assert 'points="0.0,1000.0 1000.0,0.0"' in svg
    assert "&lt;a&gt;" in svg
    assert line_chart([Series("a", "first", [(2e4, 3e6)])], x_name="x", y_name="y").count(">20k<")
    assert len({kind_of(number) for number in range(16)}) == 16


def test_a_long_line_is_thinned_and_keeps_its_peaks() -> None:
    points = [(float(n), math.sin(n / 900)) for n in range(9000)]
    points[4321] = (4321.0, 7.0)
    points[4322] = (4322.0, -7.0)
    thin = thinned(points, 100)
    assert len(thin) <= 200
    assert thin == sorted(thin)
    assert {points[4321], points[4322]} <= set(thin)
    assert set(thin) <= set(points)
    assert thinned(points[:150], 100) == points[:150]
    assert [reach_of(points[:n]) for n in (10, 100, 400, 5000)] == [0, 5, 10, 100]


def test_previews_are_escaped_and_marked() -> None:
    assert str(marked("<b> ⟦yes & no⟧ x")) == "&lt;b&gt; <mark>yes &amp; no</mark> x"


def test_sizes_and_durations() -> None:
    assert [sized(n) for n in (12, 29696, 19_500_000, 3 * 2**30)] == [
        "12 bytes", "29.0 KiB", "18.6 MiB", "3.00 GiB"
    ]  # fmt: skip
    assert [numbered(n) for n in (0.0, 0.12345, -3.0, 21.777, 314.16, 12345.6, 2e-6, 3e7)] == [
        "0.0000", "0.1235", "-3.0000", "21.78", "314.2", "12,346", "2e-06", "3e+07"
    ]  # fmt: skip
    assert [timed(s) for s in (3.04, 65, 7300)] == ["3.0 s", "1 min 5 s", "2 h 1 min"]


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds no run"):
        write_report(tmp_path)
