"""The benchmark of registered adapters, tiny: its side answers, and the report has what it promises."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks import many_sides, registered
from benchmarks.core import Spread
from tests.benchmarks.test_many_adapters import SMALL

SOME = Spread(0.1, 0.1, 0.2)


def test_its_side_answers(tmp_path: Path) -> None:
    many_sides.save_adapters(tmp_path, 4, SMALL)
    side = registered.Served(str(tmp_path), registered=4, rows=2, turns=3, sizes=SMALL)
    found = side.step(0)
    assert found["units"] == 12 and found["each"] > 0 and found["one"] > 0
    for others in (0, 1):
        first = side.first(1, others)
        assert all(first[place] >= first[f"{place}, longest"] > 0 for place in registered.PLACES)
        assert (first["turn"] > 0) == (others > 0) and not side.loop.busy
    assert set(side.all(2, few=2)) == {"each", "few"}
    requests = side.answered(random.Random(3), side.names)
    assert len({request.slot for request in requests}) == 4
    side.ended(requests)


def test_its_report() -> None:
    rates = {"each": {"rate": SOME, "over": SOME}, "one": {"rate": SOME, "over": SOME}}
    decode = {"part": "decode", "least": "2", "rates": {"1": rates, "9": rates}, "others": SOME}
    assert any(line.startswith("| 9 | 0.1 (0.1 … 0.2) |") for line in registered.table(decode, 2))
    found = dict.fromkeys(registered.PLACES, SOME)
    found |= {f"{place}, longest": SOME for place in registered.PLACES} | {"turn": SOME}
    first = {"part": "first", "registered": 1000, "found": {"0": found, "1": found}}
    lines = registered.table(first, 2)
    assert "## Until the first token, of 1,000 registered, ms" in lines
    assert f"| on disk |{' 100.0 (100.0 … 200.0) |' * 3}" in lines
    every = {
        "part": "all",
        "registered": 9,
        "few": 2,
        "rates": {"each": SOME, "few": SOME},
        "over": SOME,
    }
    assert "for 2 adapters 0.1 (0.1 … 0.2)" in registered.table(every, 2)[2]
