"""What the benchmarks of a training step share: their options, a row for each allocator, and their report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import core, report
from benchmarks.core import Patience, Sample, Worker

Row = dict[str, Any]


def parser(
    name: str, about: str | None, rows: int = 4, tokens: int = 512
) -> argparse.ArgumentParser:
    """The options of a benchmark whose step is a batch of ``rows`` × ``tokens``."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    report.add_options(made)
    made.add_argument("--rows", type=int, default=rows)
    made.add_argument("--tokens", type=int, default=tokens)
    made.add_argument("--rank", type=int, default=16)
    return made


def add_run(made: argparse.ArgumentParser, *, warmup: int, rounds: int) -> None:
    """The options of a benchmark whose rounds are parts of one run: one allocator, unless more are asked for."""
    report.add_options(made)
    made.set_defaults(warmup=warmup, rounds=rounds, allocator=["default"])
    made.add_argument("--rank", type=int, default=16)
    made.add_argument(
        "--repeat", type=int, default=2, help="at most so many times the rounds, on a busy machine"
    )


def add_model(made: argparse.ArgumentParser) -> None:
    """The option of a real model."""
    made.add_argument("--model", help="folder of a causal model (default: SmolLM2-135M-Instruct)")


def model_folder(folder: str | None) -> str:
    """The folder given, or that of the real model."""
    from recipes import assets

    return folder or str(assets.smollm2())


def take_turns(
    running: Mapping[str, Worker], options: argparse.Namespace, say: Callable[[Sample], None]
) -> list[Sample]:
    """The samples of all sides, as the options ask."""
    return core.take_turns(
        running, warmup=options.warmup, rounds=options.rounds,
        patience=Patience(seconds=options.patience), say=say,
    )  # fmt: skip


def take_parts(
    running: Mapping[str, Worker], options: argparse.Namespace, say: Callable[[Sample], None]
) -> list[Sample]:
    """As `take_turns`, with no more rounds than `add_run` lets the options say."""
    patience = Patience(seconds=options.patience, factor=options.repeat)
    return core.take_turns(
        running, warmup=options.warmup, rounds=options.rounds, patience=patience, say=say
    )


def measured(name: str, options: argparse.Namespace, measure: Callable[[str], Row]) -> list[Row]:
    """``measure`` with each allocator."""
    rows = []
    for allocator in options.allocator:
        print(f"{name}, allocator {allocator}", flush=True)
        rows.append(measure(allocator))
    return rows


def write(
    name: str,
    title: str,
    work: Any,
    options: argparse.Namespace,
    rows: Sequence[Row],
    table: Sequence[str],
    notes: Sequence[str],
    **more: Any,
) -> None:
    """The report. ``work`` is what one step is; the rows hold P and the count of trained parameters."""
    about = {**asdict(work), "model": Path(work.model).name, **more}
    about |= {key: rows[0][key] for key in ("P", "trained")}
    about |= {key: getattr(options, key) for key in ("threads", "warmup", "rounds")}
    report.write(Path(options.out), name, title, about, rows, table, notes)
