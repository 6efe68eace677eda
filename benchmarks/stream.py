"""A million rows from a file to the tokens of steps: how fast, and in how much memory.

    python -m benchmarks stream

Rows of a JSONL file (prompt and completion, about thirty tokens) are read, checked, rendered, tokenised with
SmolLM2's tokenizer and grouped into steps: once streamed, and once written to the cache of tokens. Peak resident
memory is noted at a tenth of the way and at the end; the difference is what grows with the number of rows.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from benchmarks.worker import peak_bytes, reset_peak
from recipes import assets

WORDS = [
    "harbour",
    "lantern",
    "river",
    "copper",
    "winter",
    "garden",
    "signal",
    "bridge",
    "paper",
    "island",
    "engine",
    "letter",
    "market",
    "season",
    "window",
    "valley",
    "silver",
    "summer",
    "anchor",
    "ticket",
]


def write_rows(path: Path, count: int) -> None:
    """Rows of random words."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{number}: " + " ".join(draw.choices(WORDS, k=12))
            row = {"prompt": prompt, "completion": " ".join(draw.choices(WORDS, k=4))}
            file.write(json.dumps(row) + "\n")


def consume(kind: str, path: Path, count: int) -> dict[str, Any]:
    """Read it all, in this process."""
    from trimtab.data import (
        ExampleConfig,
        Outcomes,
        RenderConfig,
        Renderer,
        StreamFeed,
        open_source,
        read_examples,
        strict,
        tokenise,
    )
    from trimtab.models.load import load_tokenizer

    renderer = Renderer(load_tokenizer(str(assets.smollm2())), RenderConfig(completions="plain"))
    config = ExampleConfig(context=512)
    reset_peak()
    began = time.perf_counter()
    source = open_source(path)
    opened = time.perf_counter() - began
    marks: list[int] = []
    seen = tokens = 0
    if kind == "stream":

        def read(start: int) -> Iterator[Any]:
            return strict(read_examples(source, renderer, Outcomes(config), start))

        feed = StreamFeed(read, source.digest, examples=16, tokens=None, seed=0)
        for members, _ in feed.steps(1):
            seen += len(members)
            tokens += sum(map(len, members))
            if not marks and seen >= count // 10:
                marks.append(peak_bytes())
    else:

        def noted(done: int, total: int | None) -> None:
            if done == count // 10:
                marks.append(peak_bytes())

        with tempfile.TemporaryDirectory() as folder:
            portion, _ = tokenise(source, renderer, config, folder=Path(folder), progress=noted)
            seen, tokens = len(portion.file), int(portion.file.lengths.sum())
    seconds = time.perf_counter() - began
    marks.append(peak_bytes())
    return {
        "kind": kind, "rows": seen, "tokens": tokens, "open_seconds": opened, "seconds": seconds,
        "peak_at_a_tenth": marks[0], "peak": marks[-1],
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="stream")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(consume(options.one[0], Path(options.one[1]), options.rows)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows)
        for kind in ("stream", "cache"):
            command = [sys.executable, "-m", "benchmarks.stream", "--one", kind, str(path)]
            command += ["--rows", str(options.rows)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            rows.append(json.loads(said.stdout.splitlines()[-1]))
    result = {"machine": machine(), "commit": commit(), "rows": rows}
    (options.out / "stream.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "stream.md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# A million rows, streamed and tokenised",
        "",
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores; commit {result['commit']}. Made by "
        "`python -m benchmarks stream`.",
        "",
        "| way | rows | tokens | rows/s | peak memory at a tenth | at the end | growth per row |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        growth = (row["peak"] - row["peak_at_a_tenth"]) / (0.9 * row["rows"])
        lines.append(
            f"| {row['kind']} | {row['rows']:,} | {row['tokens']:,} | {row['rows'] / row['seconds']:,.0f} "
            f"| {row['peak_at_a_tenth'] / 2**20:.0f} MiB | {row['peak'] / 2**20:.0f} MiB | {growth:.0f} bytes |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
