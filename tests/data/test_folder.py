"""Whatever holds data opens: files, folders, data sets, lists; what does not says what it lacks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from tests.data import kit
from tests.data.test_tables import resumes
from trimtab.data import Folder, JsonFile, JsonlFile, Row, TextRecord, open_source, parse_row
from trimtab.data.hub import from_hub
from trimtab.errors import DataError

ROWS = [{"prompt": f"one {number}", "completion": "two"} for number in range(5)]


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two kinds of files, a file in a folder, a hidden one, and two that are no data."""
    kit.write_jsonl(tmp_path / "b.jsonl", ROWS)
    (tmp_path / "a.csv").write_text("prompt,completion\nx,y\nz,w\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("a document\nof two lines\n")
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "run.sh").write_text("echo")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / "Makefile").write_text("all:")
    return tmp_path


def test_folder(folder: Path) -> None:
    source = open_source(folder)
    rows = resumes(source)
    assert [row.origin for row in rows] == [
        *("a.csv:2", "a.csv:3"),
        *(f"b.jsonl:{number}" for number in range(1, 6)),
        "deep/c.md:1",
    ]
    assert source.kind == (
        "folder of 3 files: 1 CSV with 2 columns (commas), 1 JSONL, 1 text, one document"
    )
    assert source.notes == (
        f"{folder.name}: LICENSE, README.md left out.",
        f"{folder.name}: 2 files of an unknown kind left out (1 with no ending, 1 with .sh).",
    )
    assert parse_row(rows[-1]) == TextRecord("a document\nof two lines\n", "deep/c.md:1")
    before = source.digest
    assert open_source(folder).digest == before
    (folder / "deep" / "c.md").write_text("another")
    assert open_source(folder).digest != before


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev"):
        kit.write_jsonl(tmp_path / f"{name}.jsonl", ROWS[:2])
    (tmp_path / "test").mkdir()
    kit.write_jsonl(tmp_path / "test" / "x.jsonl", ROWS[:1])
    kit.write_jsonl(tmp_path / "more.jsonl", ROWS[:1])
    with pytest.raises(DataError, match="has the splits validation, test, train; choose one with"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no split 'trial'. Did you mean 'train'"):
        open_source(tmp_path, split="trial")
    counts = {split: open_source(tmp_path, split=split).count for split in ("train", "test", "val")}
    assert counts == {"train": 4, "test": 1, "val": 2}
    assert open_source(tmp_path, split="train").notes == (
        f"{tmp_path.name}: 1 file of no split left out.",
    )


def test_a_folder_with_one_split_needs_no_choice(tmp_path: Path) -> None:
    kit.write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert open_source(tmp_path).count == open_source(tmp_path, split="train").count == 5
    (tmp_path / "other").mkdir()
    kit.write_jsonl(tmp_path / "other" / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="no file in other is named train, validation or test"):
        open_source(tmp_path / "other", split="train")


def test_folders_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data file. Known: .jsonl"):
        open_source(tmp_path)
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"holds no data file \(1 of another kind\)"):
        Folder(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    kit.write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="no file or folder .*trian.jsonl'. Did you mean 'train.js"):
        open_source(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"no folder .*nowhere' either"):
        open_source(tmp_path / "nowhere" / "a.jsonl")


def test_an_id_that_the_hub_does_not_give() -> None:
    # The tests run offline, as many machines do.
    with pytest.raises(DataError, match=r"no file or folder 'nobody/nothing' here, and .* the hub"):
        open_source("nobody/nothing")


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    path = kit.write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="split='train' was given, and a.jsonl is one file"):
        open_source(path, split="train")
    with pytest.raises(DataError, match="config='en' is for data sets of the hub"):
        open_source(path, config="en")
    with pytest.raises(DataError, match="split and config are for data sets and folders"):
        open_source(ROWS, split="train")
    with pytest.raises(DataError, match="an object of type int"):
        open_source(3)
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(DataError, match=r"a.xyz: a name with the ending '.xyz' does not tell"):
        open_source(tmp_path / "a.xyz")


def test_jsonl_packed_by_gzip(tmp_path: Path) -> None:
    plain = kit.write_jsonl(tmp_path / "a.jsonl", [*ROWS[:2], "", *ROWS[2:]])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [row.value for row in resumes(open_source(packed))] == ROWS
    assert open_source(packed).digest == open_source(plain).digest


def test_json_lists_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        '\n[\n {"text": "a"},\n\n {"text": "b",\n "text": "c"}, {"text": NaN},\n 3\n]\n'
    )
    rows = resumes(open_source(path))
    assert [row.origin for row in rows] == ["a.json:3", "a.json:5", "a.json:6", "a.json:7"]
    assert [row.fault.split(" ")[0] for row in rows] == ["", "broken", "broken", ""]
    assert "the key 'text' occurs twice" in rows[1].fault
    with pytest.raises(DataError, match=r"^a.json:7: expected a JSON object, found a number"):
        parse_row(rows[3])


def test_json_that_is_jsonl_by_another_name(tmp_path: Path) -> None:
    path = kit.write_jsonl(tmp_path / "a.json", ROWS)
    source = open_source(path)
    assert isinstance(source, JsonlFile)
    assert source.count == 5


BAD_JSON = {
    "cut short": ('[{"text": "a"},\n{"tex', r"a.json:2: broken JSON: .* \(column"),
    "no comma": ('[{"text": "a"}\n{"text": "b"}]', "a.json:2: broken JSON: expected a comma or ]"),
    "more below": ('[{"text": "a"}]\n[]', "a.json:2: broken JSON: something follows the list"),
    "empty list": ("[ ]", "a.json: the list is empty"),
    "a string": ('"a"', r"a.json: expected a list of objects"),
    "empty": ("", r"a.json: expected a list of objects"),
    "one object": ('{"rows": [\n1]}', "a.json: the file is one JSON object over several lines"),
    "too deep": ("[" * 100_000, "a.json:1: broken JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_files(tmp_path: Path, name: str) -> None:
    text, reason = BAD_JSON[name]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        open_source(tmp_path / "a.json")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(DataError, match=r"^a.txt:2: not UTF-8 \(byte 9\)"):
        parse_row(next(open_source(tmp_path / "a.txt").rows()))
    (tmp_path / "a.json").write_bytes(b'["\xe9"]')
    with pytest.raises(DataError, match=r"a.json: not UTF-8 \(byte 3\)"):
        JsonFile(tmp_path / "a.json")


def test_lists_and_generators() -> None:
    source = open_source(row for row in ROWS)
    assert [row.value for row in resumes(source)] == ROWS
    assert source.digest == open_source(ROWS).digest != open_source(ROWS[1:]).digest
    assert open_source(source) is source
    with pytest.raises(DataError, match="the list of rows is empty"):
        open_source([])
    with pytest.raises(DataError, match="rows:1: expected a JSON object, found a string"):
        parse_row(next(open_source(["a"]).rows()))


def test_data_sets_in_memory_streamed_and_saved(tmp_path: Path) -> None:
    rows = [{"text": f"{number}", "label": number % 3 or None} for number in range(600)]
    dataset = datasets.Dataset.from_list(rows)
    source = open_source(dataset)
    assert (source.count, source.kind) == (600, "data set: text, label")
    assert source.digest == dataset._fingerprint
    found = list(source.rows())
    assert found[7] == Row({"text": "7", "label": 1}, "dataset:row 8", "", 7)
    assert [row.value for row in found] == rows
    assert list(source.rows(300)) == found[300:]
    assert list(open_source(dataset.with_format("numpy")).rows(300)) == found[300:]

    stream = open_source(dataset.to_iterable_dataset())
    assert (stream.count, list(stream.rows())) == (None, found)
    assert list(stream.rows(300)) == found[300:]
    assert stream.digest == open_source(dataset.to_iterable_dataset()).digest

    dataset.save_to_disk(tmp_path / "one")
    saved = open_source(tmp_path / "one")
    assert [row.value for row in saved.rows(590)] == rows[590:]
    both = datasets.DatasetDict(train=dataset, test=dataset.select(range(3)))
    both.save_to_disk(tmp_path / "two")
    for what in (both, tmp_path / "two"):
        with pytest.raises(DataError, match="splits train, test; choose one"):
            open_source(what)
        assert open_source(what, split="test").count == 3
    with pytest.raises(DataError, match="this data set is one split already"):
        open_source(dataset, split="train")
    with pytest.raises(DataError, match="the data set has no rows"):
        open_source(dataset.select([]))


def test_data_sets_that_the_library_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As from the hub, but that a folder stands in for the network.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        kit.write_jsonl(folder / f"{split}.jsonl", rows)
    with pytest.raises(DataError, match="has the splits train, test; choose one"):
        from_hub(str(folder))
    with pytest.raises(DataError, match="no split 'tset'. Did you mean 'test'"):
        from_hub(str(folder), split="tset")
    with pytest.raises(DataError, match="BuilderConfig 'en' not found"):
        from_hub(str(folder), split="test", config="en")
    assert from_hub(str(folder), split="train[:3]").count == 3
    whole = from_hub(str(folder), split="train")
    stream = from_hub(str(folder), split="train", stream=True)
    assert [row.value for row in whole.rows()] == ROWS
    assert list(stream.rows(2)) == list(whole.rows(2))
    assert (stream.count, whole.count) == (None, 5)
    assert stream.digest == from_hub(str(folder), split="train", stream=True).digest
    assert "streamed, split train" in stream.kind


def test_a_broken_saved_data_set(tmp_path: Path) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(DataError, match="this saved data set cannot be read"):
        open_source(tmp_path)
