"""A soak: many tenants of one engine do random things for minutes, and every law still holds at the end.

Tenants of all kinds of methods come, learn, answer, are scaled, saved, loaded, sent to disk and back, and go; requests
are cancelled and streams left anywhere; data and values turn to no numbers, files are torn, forwards fail. Each answer
(a share of them) is compared with that of the same values alone, each tenant with a twin that trains alone, and at
every rest nothing may be taken or kept that nobody has (`benchmarks.soak_laws`).

python -m benchmarks soak --minutes 10            as long as that
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, soak_laws, soak_serving, soak_training
from benchmarks.core import ROOT
from benchmarks.many_sides import resident
from benchmarks.soak_world import BrokenLawError, World

DEEDS = {**soak_training.DEEDS, **soak_serving.DEEDS}
EVERY, EMPTY = 40, 4
"""Deeds between two rests, and rests between two at which everybody is taken out."""
GROWTH = 8 << 20
"""Bytes by which the process may grow from the third quarter of a soak to the last."""


@dataclass(frozen=True)
class Look:
    """What was seen when everybody had been taken out."""

    deeds: int
    seconds: float
    resident: int


def do(world: World) -> None:
    """One deed, and whatever came by then."""
    (deed,) = world.draw.choices(list(DEEDS), list(DEEDS.values()))
    world.note(deed.__name__)
    deed(world)
    soak_laws.settle(world)


def looks(world: World, on: Callable[[int, float], bool], every: int = EVERY) -> Iterator[Look]:
    """Deeds as long as ``on`` (of deeds and seconds so far) says so. Raises `BrokenLawError`."""
    began, deeds, rests = time.perf_counter(), 0, 0
    while on(deeds, time.perf_counter() - began):
        for _ in range(every):
            do(world)
        deeds, rests = deeds + every, rests + 1
        if rests % EMPTY:
            soak_laws.rest(world)
        else:
            soak_laws.leave(world)
            yield Look(deeds, time.perf_counter() - began, resident())
    soak_laws.leave(world)


def growth(found: Sequence[Look]) -> int:
    """Bytes by which the process grew from the third quarter to the last."""
    quarter = len(found) // 4
    third, last = found[-2 * quarter : -quarter], found[-quarter:]
    return int(
        statistics.median(look.resident for look in last)
        - statistics.median(look.resident for look in third)
    )


def table(found: Mapping[str, Any]) -> list[str]:
    """What was done and seen, as Markdown."""
    done, seen = found["done"], found["looks"]
    answers, checked = done["answers"], done["answers checked"]
    kinds = Counter({k: v for k, v in done.items() if not k.startswith("answers")})
    deeds = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in kinds.most_common())
    errors = ", ".join(
        f"{name} {count:,}" for name, count in Counter(found["errors"]).most_common()
    )
    quarters = [seen[max(len(seen) * n // 4 - 1, 0)]["resident"] / 1e6 for n in (1, 2, 3, 4)]
    return [
        f"{found['deeds']:,} deeds in {found['seconds'] / 60:.1f} minutes, {answers:,} answers, of which {checked:,} "
        "were compared with those of the same values alone. No law was broken.", "",
        "| the process, MB, when everybody was taken out | after 1/4 | 2/4 | 3/4 | at the end |",
        "|---|---|---|---|---|",
        "| resident | " + " | ".join(f"{value:,.1f}" for value in quarters) + " |", "",
        f"From the third quarter to the last it grew by {found['growth'] / 1e6:.2f} MB (medians; at most "
        f"{GROWTH / 1e6:.1f} are allowed).", "",
        f"Deeds: {deeds}.", "",
        f"Errors that were raised, each the one that is meant for its fault: {errors}.",
    ]  # fmt: skip


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """``soak.json`` and ``soak.md``."""
    place = report.machine()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in report.PACKAGES)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = f"{date}, commit {report.commit()}. {place['cpu']}, {place['cores']} cores, one thread; {versions}."
    text = "\n".join(["# A soak", "", head, "", __doc__.split("\n\n")[1], "", *table(found), ""])
    whole = {
        "benchmark": "soak",
        "date": date,
        "commit": report.commit(),
        "machine": place,
        **found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / "soak.md").write_text(text, encoding="utf-8")
    print(text)


def main(argv: Sequence[str]) -> int:
    """Soak, and write the report. Raises `BrokenLawError`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--share", type=float, default=0.5, help="part of the answers that is checked"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    seen: list[Look] = []
    with tempfile.TemporaryDirectory() as place:
        world = World(Path(place), options.seed, options.share)
        for look in looks(world, lambda deeds, seconds: seconds < 60 * options.minutes):
            seen.append(look)
            print(
                f"  {look.seconds:6.0f} s, {look.deeds:,} deeds: {look.resident / 1e6:.1f} MB",
                flush=True,
            )
        world.close()
    found = {
        "seed": options.seed, "deeds": seen[-1].deeds, "seconds": seen[-1].seconds, "growth": growth(seen),
        "done": dict(world.done), "errors": dict(world.errors), "looks": [asdict(look) for look in seen],
    }  # fmt: skip
    write(options.out, found)
    if found["growth"] > GROWTH:
        raise BrokenLawError(f"the process grew by {found['growth']:,} bytes")
    return 0
