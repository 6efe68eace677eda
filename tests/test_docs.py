"""What the documentation shows is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trimtab.data import parse_record

DOCS = Path(__file__).parent.parent / "docs"


def test_each_shape_is_what_it_is_called() -> None:
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\*\*(.+?)\*\*.*?\n\n```json\n(.+?)\n```", text, re.MULTILINE)
    assert len(shown) == 9
    for name, row in shown:
        assert parse_record(json.loads(row), "docs").shape == name
