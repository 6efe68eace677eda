"""A tiny model folder and a small job for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.data import kit as data_kit
from tests.engine import kit


def model_folder(path: Path) -> Path:
    """A model folder as `trimtab.load` reads it."""
    base = kit.base()
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


def rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Is the sea deep? A question whose answer is one of two words."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        good = draw.random() < 0.5
        words = [draw.choice(["sea", "ship", "deep"] if good else ["not", "named", "two"]) for _ in range(3)]
        made.append({"prompt": " ".join(words), "completion": "yes" if good else "no"})
    return made


def data_file(path: Path, count: int, *, seed: int = 0) -> Path:
    return data_kit.write_jsonl(path, rows(count, seed=seed))
