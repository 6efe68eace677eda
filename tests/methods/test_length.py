"""A method is about sixty lines: what several share lies in `adapt/`, under a name of its own."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import trimtab.adapt.contract

FOLDER = Path(trimtab.adapt.contract.__file__).parents[1] / "methods"


def test_half_of_the_method_files_have_at_most_eighty_lines() -> None:
    files = [file for file in FOLDER.glob("*.py") if file.name != "__init__.py"]
    lengths = {file.stem: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lengths) > 30
    assert median(lengths.values()) <= 80, sorted(lengths.items(), key=lambda item: item[1])


def test_no_method_imports_another() -> None:
    for file in FOLDER.glob("*.py"):
        assert "trimtab.methods" not in file.read_text(encoding="utf-8"), file.name
