"""A user's own functions: found by name, applied in order, and their failures told row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.data import Mapped, load_function, open_source
from trimtab.errors import ConfigError, DataError

ROWS = [{"q": f"question {n}", "a": f"answer {n}", "n": n} for n in range(10)]
CODE = """
from dataclasses import dataclass

COUNT = 3

def odd(row):
    return row["n"] % 2

def twice(row):
    if row["n"] == 3:
        return None
    if row["n"] == 5:
        raise KeyError("missing")
    if row["n"] == 7:
        return "text"
    return [{"text": row["q"]}, {"text": row["a"]}]
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_filter_and_map_by_name(code: Path) -> None:
    mapped = Mapped(open_source(ROWS), filter=f"{code}:odd", map=f"{code}:twice")
    rows = list(mapped.rows())
    assert [(row.index, row.part, row.value) for row in rows if not row.fault] == [
        (n, part, {"text": f"{word} {n}"})
        for n in (1, 9)
        for part, word in enumerate(("question", "answer"))
    ]
    assert [(row.origin, row.fault) for row in rows if row.fault] == [
        ("rows:6", f"the map function {code}:twice raised KeyError: 'missing'"),
        (
            "rows:8",
            f"the map function {code}:twice returned a string; it must return a dict, a list of "
            "dicts, or None.",
        ),
    ]
    assert mapped.dropped == 6  # five even ones, and the third
    assert mapped.count is None
    assert mapped.kind == f"rows in memory; through {code}:odd; through {code}:twice"
    for place, row in enumerate(rows):
        assert list(mapped.after(row)) == rows[place + 1 :]
        assert list(mapped.following(row.index, row.part)) == rows[place + 1 :]
    assert list(mapped.rows(9)) == rows[-2:]
    assert mapped.dropped == 0


def test_columns_are_renamed_first_and_taken_alone() -> None:
    source = open_source(ROWS)
    mapped = Mapped(source, columns={"prompt": "q", "completion": "a"})
    assert next(mapped.rows()).value == {"prompt": "question 0", "completion": "answer 0"}
    assert mapped.count == 10
    changed = Mapped(
        source, columns={"text": "q"}, filter=lambda row: row["text"].endswith("4"), map=dict
    )
    assert [row.value for row in changed.rows()] == [{"text": "question 4"}]
    missing = next(Mapped(source, columns={"text": "qq"}).rows())
    assert missing.fault == "there is no column 'qq'. Did you mean 'q'? The row has q, a, n."
    left = Mapped(source, ignore=["n"])
    assert next(left.rows()).value == {"q": "question 0", "a": "answer 0"}
    with pytest.raises(ConfigError, match="drop 'ignore'"):
        Mapped(source, columns={"text": "q"}, ignore=["n"])


def test_faults_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{\n[1]\n{"text": "a"}\n')
    rows = list(Mapped(open_source(path), ignore=["b"]).rows())
    assert [row.fault.split(":")[0] for row in rows] == [
        "broken JSON",
        "expected an object, found a list.",
        "",
    ]


def test_the_digest_notices_edits(code: Path) -> None:
    source = open_source(ROWS)

    def digest() -> str:
        return Mapped(source, map=f"{code}:twice").digest

    first = digest()
    assert digest() == first != Mapped(source, filter=f"{code}:twice").digest
    assert Mapped(source, map=f"{code}:odd").digest != first
    assert Mapped(source).digest != Mapped(source, ignore=["a"]).digest != source.digest
    code.write_text(CODE + "\n# a remark\n")
    assert digest() != first
    code.write_text(CODE.replace('row["q"]', 'row["a"]'))
    assert next(Mapped(source, map=f"{code}:twice").rows()).value == {"text": "answer 0"}


def test_functions_without_a_file() -> None:
    made: dict = {}
    for word in ("a", "b"):
        made[word] = eval(f"lambda row: {{'text': '{word}'}}")
    digests = [load_function(made[word]).digest for word in "aab"]
    assert [digests.index(digest) for digest in digests] == [0, 0, 2]
    assert load_function("json:dumps").call({"a": 1}) == '{"a": 1}'
    assert load_function(dict).digest == load_function(dict).digest


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("twice", "names no function; write module:function or path/to/file.py:function"),
        ("mine.py:", "names no function"),
        ("{code}:twise", "has no function 'twise'. Did you mean 'twice'"),
        ("{code}:COUNT", "is a number, not a function"),
        ("{code}x.py:twice", "there is no file .*minex?.pyx.py"),
        ("no_such_module:f", "no module 'no_such_module'. For a file, write its path"),
    ],
)
def test_functions_that_are_not_there(code: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_function(text.format(code=code))


def test_files_that_cannot_be_run(tmp_path: Path) -> None:
    for text, reason in (("def f(:", "SyntaxError"), ("import nothing_such", "ModuleNotFound")):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ConfigError, match=rf"bad.py cannot be run: {reason}"):
            load_function(f"{tmp_path}/bad.py:f")
    with pytest.raises(ConfigError, match="3 is not a function"):
        load_function(3)  # type: ignore[arg-type]


def test_functions_may_change_what_they_are_given() -> None:
    source = open_source([{"turns": ["a"]}])

    def grow(row: dict) -> dict:
        row["turns"].append("b")
        return row

    for _ in range(2):
        assert [row.value for row in Mapped(source, map=grow).rows()] == [{"turns": ["a", "b"]}]


def test_map_results_are_records_like_any(code: Path) -> None:
    with pytest.raises(DataError, match="raised ZeroDivisionError: division by zero"):
        row = next(Mapped(open_source(ROWS), map=lambda row: 1 / 0).rows())
        raise DataError(row.fault)
