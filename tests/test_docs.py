"""What the documentation shows is what the code does."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from tests.shown import run_commands, run_example, shown
from trimtab.data import parse_record

DOCS = Path(__file__).parent.parent / "docs"


def test_each_shape_is_what_it_is_called() -> None:
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\*\*(.+?)\*\*.*?\n\n```json\n(.+?)\n```", text, re.MULTILINE)
    assert len(shown) == 9
    for name, row in shown:
        assert parse_record(json.loads(row), "docs").shape == name


def test_the_numbers_of_the_jobs_are_those_of_their_reports() -> None:
    text = (DOCS.parent / "recipes" / "jobs" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\].*$", text, re.MULTILINE)
    assert rows == ["instructions", "sentiment", "topics"]
    for line in text.splitlines():
        if found := re.match(r"\| \[(\w+)\]", line):
            report = (DOCS / "reports" / f"{found[1]}.html").read_text(encoding="utf-8")
            numbers = re.findall(r"-?\d\.\d{4}", line)
            assert len(numbers) >= 2
            for number in numbers:
                assert number in report, (found[1], number)
            assert not re.search(r"(src|href)=|@import|<script", report)


def test_what_is_shown_of_storage_runs(here: Path) -> None:
    text = (DOCS / "storage.md").read_text(encoding="utf-8")
    (example,) = shown(text, "python")
    run_example(example, "storage.md")
    assert (here / "adapters/support/adapter_model.safetensors").is_file()
    for block in shown(text, "bash"):
        run_commands(block)
    assert (here / "merged-nf4").is_dir()


def test_what_is_shown_of_sweeps_runs(here: Path) -> None:
    text = (DOCS / "sweep.md").read_text(encoding="utf-8")
    (block,) = shown(text, "bash")
    run_commands(block)
    for folder, count in (("rates", 6), ("drawn", 4)):
        assert (here / "runs" / folder / "adapter/adapter_model.safetensors").is_file()
        assert len(list((here / "runs" / folder / "variants").iterdir())) == count


def test_what_is_shown_of_many_adapters_runs(here: Path) -> None:
    own, grammar, tiers = shown((DOCS / "many.md").read_text(encoding="utf-8"), "python")
    run_example(own + (grammar if find_spec("xgrammar") else ""), "docs/many.md")
    run_example(tiers, "docs/many.md")
