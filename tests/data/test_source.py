"""The chain resumes at the exact example, from any place, also by way of JSON."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import kit
from trimtab.data import (
    ExampleConfig,
    JsonlFile,
    Outcomes,
    Renderer,
    Row,
    epoch_order,
    load_examples,
    steps,
    stream_examples,
    visit,
)
from trimtab.errors import DataError


def rows(count: int) -> list[object]:
    return [{"prompt": f"one two {number}", "completion": f"{number}"} for number in range(count)]


def test_lines_have_their_numbers_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\xe2\x80\xa8"}\r\n\n  \n{"b": 1}')
    file = JsonlFile(path)
    assert list(file) == [
        Row({"a": "\u2028"}, "a.jsonl:1", "", 0),
        Row({"b": 1}, "a.jsonl:4", "", 1),
    ]
    assert file[-1] == file[1:][0]
    assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_file_and_no_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*No such file"):
        JsonlFile(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        JsonlFile(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl: the file has no records"):
        JsonlFile(empty)


@given(st.integers(0, 30), st.integers(0, 4), st.none() | st.integers(0, 5))
def test_every_item_once_an_epoch(count: int, epochs: int, seed: int | None) -> None:
    seen = [item for item, _ in visit(range(count), epochs=epochs, seed=seed)]
    for epoch in range(epochs):
        part = seen[epoch * count : (epoch + 1) * count]
        assert sorted(part) == list(range(count))
        assert part == list(epoch_order(count, seed, epoch))
    assert len(seen) == count * epochs


def test_orders_differ_by_epoch_and_seed_and_never_change() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert list(epoch_order(8, 0, 0)) == [5, 0, 3, 6, 4, 7, 2, 1]  # on every machine


@given(st.integers(1, 12), st.none() | st.integers(0, 3), st.data())
def test_visiting_resumes_at_the_exact_item(
    count: int, seed: int | None, data: st.DataObject
) -> None:
    whole = list(visit(range(count), epochs=3, seed=seed))
    stop = data.draw(st.integers(1, len(whole)))
    cursor = json.loads(json.dumps(whole[stop - 1][1]))
    assert list(visit(range(count), epochs=3, seed=seed, cursor=cursor)) == whole[stop:]


@pytest.mark.parametrize("size", [1, 3, 4, 10, 11])
def test_the_whole_chain_resumes_at_the_exact_step(tmp_path: Path, size: int) -> None:
    mixed = [*rows(10), "broken", {"prompt": "one " * 40, "completion": "x"}]
    file = JsonlFile(kit.write_jsonl(tmp_path / "a.jsonl", mixed))
    renderer = Renderer(kit.byte_level())
    config = ExampleConfig(context=30, too_long="drop", bad_rows="drop")

    def chain(cursor=None):
        lines = visit(file, epochs=3, seed=7, digest=file.digest, cursor=cursor)
        return steps(stream_examples(lines, renderer, Outcomes(config)), size)

    whole = list(chain())
    assert sum(len(step) for step, _ in whole) == 30
    assert len(whole) == 3 * -(-10 // size)
    for place, (_, cursor) in enumerate(whole, start=1):
        assert list(chain(json.loads(json.dumps(cursor)))) == whole[place:]


def test_examples_in_memory_resume_too(tmp_path: Path) -> None:
    path = kit.write_jsonl(tmp_path / "a.jsonl", rows(7))
    renderer = Renderer(kit.byte_level())
    forever = list(islice(load_examples(path, renderer).visit(epochs=None, seed=1), 40))
    again = load_examples(path, renderer).visit(epochs=None, seed=1, cursor=forever[17][1])
    assert list(islice(again, 22)) == forever[18:]


def test_a_cursor_of_other_data_is_refused(tmp_path: Path) -> None:
    renderer = Renderer(kit.byte_level())
    examples = load_examples(kit.write_jsonl(tmp_path / "a.jsonl", rows(7)), renderer)
    cursor = next(examples.visit(seed=1))[1]
    longer = load_examples(kit.write_jsonl(tmp_path / "b.jsonl", rows(8)), renderer)
    other = load_examples(kit.write_jsonl(tmp_path / "c.jsonl", rows(8)[1:]), renderer)
    for data, seed, what in (
        (longer, 1, "number of items"),
        (other, 1, "hash"),
        (examples, 2, "seed"),
    ):
        with pytest.raises(DataError, match=f"cannot resume: the .*{what} was"):
            next(data.visit(seed=seed, cursor=cursor))


def test_a_step_needs_an_example() -> None:
    with pytest.raises(DataError, match="at least one example, not 0"):
        next(steps(iter([]), 0))
    assert list(steps(iter([]), 2)) == []
