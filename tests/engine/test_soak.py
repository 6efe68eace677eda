"""The short form of a soak (`benchmarks.soak`): random deeds of many tenants, by fixed seeds, and every law afterwards.

That it can fail is tested too: with a defect planted, some law is broken within a few hundred deeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak
from benchmarks.soak_world import BrokenLawError, World
from trimtab.engine.serve import Loop, Request
from trimtab.engine.serve.ledger import Ledger
from trimtab.engine.serve.seats import Seats, Versions

FAULTS = {
    "AnswerError", "ConfigError", "DataError", "DuplicateNameError", "FileFormatError",
    "NonFiniteLossError", "OutOfLuckError", "TrainingError", "UnknownNameError",
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(tmp_path, request.param)
    yield made
    made.close()


def soaked(world: World, deeds: int, every: int = soak.EVERY) -> list[soak.Look]:
    return list(soak.looks(world, lambda done, _: done < deeds, every))


@pytest.mark.parametrize("world", [1], indirect=True)
def test_random_deeds_break_no_law(world: World) -> None:
    seen = soaked(world, 640)
    assert soak.growth(seen) < 4 * soak.GROWTH  # a process grows at first
    assert world.done["answers checked"] > 100
    assert not {deed.__name__ for deed in soak.DEEDS} - set(world.done)
    assert not FAULTS - set(world.errors)


# -- planted defects -----------------------------------------------------------------------------------


def _one_page_less(real: Callable[..., None]) -> Callable[..., None]:
    return lambda ledger, pages: real(ledger, pages[1:] if len(pages) > 2 else pages)


def _of_nobody(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda versions, adapter: 0


def _kept_for_ever(real: Callable[..., None]) -> Callable[..., None]:
    kept: list[Request] = []

    def submit(loop: Loop, request: Request) -> None:
        kept.append(request)
        real(loop, request)

    return submit


def _nothing(real: Callable[..., None]) -> Callable[..., None]:
    return lambda *_: None


PLANTED: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "a page is not released": (Ledger, "release", _one_page_less, "pages are read"),
    "what an adapter read is found by others": (Versions, "of", _of_nobody, "and alone"),
    "a request is kept": (Loop, "submit", _kept_for_ever, "Request are alive"),
    "a seat is not given back": (Seats, "rise", _nothing, "lies in a slot"),
}


@pytest.mark.parametrize("world", [4], indirect=True)
@pytest.mark.parametrize("defect", PLANTED)
def test_a_defect_breaks_one(world: World, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, planted, told = PLANTED[defect]
    monkeypatch.setattr(where, name, planted(where.__dict__[name]))
    with pytest.raises(BrokenLawError, match=told):
        soaked(world, 400, every=20)
