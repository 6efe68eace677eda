"""A folder with a tiny model and data, and commands run in it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.train import kit
from trimtab.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    kit.model_folder(folder / "model")
    kit.data_file(folder / "train.jsonl", 16)
    kit.data_file(folder / "held.jsonl", 6, seed=1)
    return folder


class Ran:
    """What a command printed, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: object, lines: str = "") -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as ended:
            main()
        shown = self._capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), shown.out, shown.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path) -> Ran:
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "120")
    return Ran(capsys, monkeypatch)
