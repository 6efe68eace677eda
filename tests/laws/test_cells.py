"""What the sample of the laws' cells covers."""

from __future__ import annotations

from tests.laws import test_generation, test_laws, test_lean, test_packed, test_served
from tests.laws.cells import LAWS, REFUSED, Cell, cells, cells_of, registered
from tests.tiny import CASES


def sampled() -> dict[str, list[Cell]]:
    return {law: cells_of(law, full=False) for law in LAWS}


def test_every_method_meets_every_law_on_one_model() -> None:
    for law, found in sampled().items():
        about = {m for m in registered() if LAWS[law](Cell(m, "llama"))}
        assert {cell.method for cell in found if cell.model == "llama"} == about, law


def test_every_method_meets_a_law_on_every_model() -> None:
    met = {cell for found in sampled().values() for cell in found}
    assert met == {Cell(m, c) for m in registered() for c in CASES if (m, c) not in REFUSED}


def test_every_law_is_met_on_every_model_that_it_is_about() -> None:
    for law, found in sampled().items():
        about = {cell.model for cell in cells() if LAWS[law](cell)}
        assert {cell.model for cell in found} == about, law


def test_the_full_product_leaves_nothing_out() -> None:
    for law, about in LAWS.items():
        assert cells_of(law, full=True) == [cell for cell in cells() if about(cell)]


def test_the_laws_listed_are_the_tests_that_exist() -> None:
    for law in LAWS:
        modules = [
            module
            for module in (test_laws, test_generation, test_lean, test_packed, test_served)
            if law in vars(module)
        ]
        assert len(modules) == 1, law
