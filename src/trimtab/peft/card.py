"""The README of a folder of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_card(folder: Path, model: Any) -> None:
    """Write or complete the README."""
