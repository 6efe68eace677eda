"""PEFT scripts run under both packages, with nothing changed but the import lines, and find the same.

Each script leaves what it found in ``results``. Counts, names and generated ids are equal, numbers to 1e-5.
"""

from __future__ import annotations

import math
import re
import runpy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = sorted(Path(__file__).with_name("scripts").glob("*.py"))
TOLERANCE = 1e-5


def swapped(text: str) -> str:
    """The script with its import lines changed, and nothing else."""
    text = re.sub(r"^from peft\b", "from trimtab.peft", text, flags=re.MULTILINE)
    return re.sub(r"^import peft$", "import trimtab.peft as peft", text, flags=re.MULTILINE)


def run(text: str, folder: Path) -> dict[str, Any]:
    """What a script finds, run as a file of its own."""
    file = folder / "script.py"
    file.write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    found: dict[str, Any] = runpy.run_path(str(file))["results"]
    return found


def differences(ours: Any, theirs: Any, where: str = "results") -> list[str]:
    """Where two findings differ: whole numbers and texts at all, others by more than rounding."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        if ours.keys() != theirs.keys():
            return [f"{where}: {sorted(map(str, ours.keys() ^ theirs.keys()))} on one side only"]
        return [
            d for key in theirs for d in differences(ours[key], theirs[key], f"{where}[{key!r}]")
        ]
    if _listed(theirs) and _listed(ours):
        if len(ours) != len(theirs):
            return [f"{where}: {len(ours)} against {len(theirs)}: {ours} against {theirs}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{where}[{n}]")]
    if isinstance(theirs, float) and isinstance(ours, float):
        close = math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=1e-9)
        return [] if close else [f"{where}: {ours!r} against {theirs!r}"]
    return (
        []
        if type(ours) is type(theirs) and ours == theirs
        else [f"{where}: {ours!r} against {theirs!r}"]
    )


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_the_same_with_one_import_changed(script: Path, tmp_path: Path) -> None:
    text = script.read_text(encoding="utf-8")
    other = swapped(text)
    changed = [line for line in other.splitlines() if line not in text.splitlines()]
    assert changed and all("trimtab.peft" in line for line in changed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of much, and so do its users' other libraries
        theirs = run(text, tmp_path)
    ours = run(other, tmp_path)
    found = differences(ours, theirs)
    assert not found, "\n".join(found[:20])


def test_the_scripts_are_of_many_kinds() -> None:
    assert len(SCRIPTS) >= 24
    for script in SCRIPTS:
        code = script.read_text(encoding="utf-8")
        assert "trimtab" not in code and re.search(
            r"^(from peft|import peft)", code, re.MULTILINE
        ), script


def test_differences_are_seen() -> None:
    assert differences({"a": [1, 2.0]}, {"a": (1, 2.0 + 1e-6)}) == []
    assert differences({"a": [1, 2.0]}, {"a": [1, 2.001]}) and differences({"a": 1}, {"a": 2})
    assert differences([1], [1.0]) and differences({"a": 1}, {"b": 1}) and differences([1], [1, 2])
