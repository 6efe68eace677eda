"""The committed list of what methods cannot do, and the page made of it, are what is found by doing it."""

from __future__ import annotations

import pytest

from tests.laws.capabilities import CAPABILITIES, PAGE, UNMERGED, committed, refusals
from tests.laws.cells import registered
from tests.laws.methods_page import page

MEND = "see: python -m tests.laws.capabilities, and --write"


@pytest.mark.parametrize("method", registered())
def test_a_method_does_what_is_listed_and_no_less(method: str) -> None:
    assert refusals(method).keys() == committed().get(method, {}).keys(), MEND


def test_each_refusal_has_a_reason() -> None:
    known = {name for each in CAPABILITIES for name in (each, f"{each}{UNMERGED}")}
    for method, cells in committed().items():
        assert method in registered() and cells.keys() <= known, method
        for cell, why in cells.items():
            assert len(why.split()) >= 4, (method, cell)


def test_every_method_merges_mixes_and_trains_with_others_unless_its_mathematics_forbids() -> None:
    for method, cells in committed().items():
        assert "mixed batch" not in cells and "trained together" not in cells, method


def test_the_page_is_made_of_the_list() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(committed()), MEND
