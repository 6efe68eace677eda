"""The map function of the job ``topics``."""

from typing import Any

WORDS = 60


def first_words(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the beginning of its text only."""
    return {**row, "text": " ".join(row["text"].split()[:WORDS])}
