"""Real files, as LLaMA-Factory ships them: every row is read, and a bad one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import assets
from trimtab.data import (
    ChatRecord,
    PreferenceRecord,
    UnpairedRecord,
    open_source,
    parse_record,
    parse_row,
)
from trimtab.errors import DataError


@pytest.fixture(scope="module", autouse=True)
def package() -> Path:
    try:
        return assets.archive(assets.LLAMA_FACTORY)
    except assets.UnavailableError as error:
        pytest.skip(str(error))


def test_instructions(tmp_path: Path) -> None:
    rows = assets.alpaca()
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    source = open_source(path)
    assert (source.count, source.kind) == (999, "JSON, a list")
    lines = path.read_text(encoding="utf-8").splitlines()
    good, bad = 0, []
    for row, given in zip(source.rows(), rows, strict=True):
        assert lines[int(row.origin.split(":")[1]) - 1].strip() == "{"
        try:
            record = parse_row(row)
        except DataError as error:
            bad.append((given, str(error)))
            continue
        assert isinstance(record, ChatRecord)
        assert record.shape == "instruction/input/output"
        user, assistant = record.messages
        assert assistant.content == given["output"]
        assert user.content.startswith(given["instruction"])
        assert user.content.endswith(given["input"])
        good += 1
    assert good >= 998
    assert all(not given["output"].strip() for given, _ in bad), bad


def test_identity() -> None:
    records = [parse_record(row, "") for row in assets.identity()]
    assert len({record.key() for record in records}) > 80


def test_preferences() -> None:
    for row in assets.preferences():
        record = parse_record(row, "")
        assert isinstance(record, PreferenceRecord)
        assert record.prompt[-1].role == "user"
        assert [side[0].content for side in (record.chosen, record.rejected)] == [
            row[side]["value"] for side in ("chosen", "rejected")
        ]


def test_unpaired() -> None:
    records = [parse_record(row, "") for row in assets.unpaired()]
    assert all(isinstance(record, UnpairedRecord) for record in records)
    assert sum(record.desired for record in records if isinstance(record, UnpairedRecord)) == 150


def test_tool_calls() -> None:
    calls = answers = 0
    for row in assets.tool_calls():
        record = parse_record(row, "")
        assert isinstance(record, ChatRecord)
        assert len(record.tools) == len(json.loads(row["tools"] or "[]"))
        made = [call for turn in record.messages for call in turn.tool_calls]
        calls += len(made)
        answers += sum(turn.role == "tool" for turn in record.messages)
        assert len({call.id for call in made}) == len(made)
    assert calls == sum(
        turn["from"] == "function_call"
        for row in assets.tool_calls()
        for turn in row["conversations"]
    )
    assert answers == calls > 100
