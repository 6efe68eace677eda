"""Every benchmark that says how it is run is run so."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import __main__ as command


def test_commands_in_docstrings_are_known() -> None:
    folder = Path(command.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    said = {name for text in texts for name in re.findall(r"python -m benchmarks ([a-z]\w+)", text)}
    assert said == {*command.NAMES, *command.APART}
