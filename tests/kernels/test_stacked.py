"""Rows by the matrices of their slots, against the twin and against one product a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.kernels import stacked
from trimtab.kernels.stacked import Rows, stacked_product, stacked_product_reference

ORDERS = {
    "one each": [0, 1, 2, 3, 4],
    "any order": [3, 0, 4, 1, 0, 2, 3],
    "several in a row": [2, 2, 2, 0, 0, 4],
    "one row": [1],
    "long runs": [1] * 20 + [3] * 12 + [0] * 3,
    "none": [],
}


def given(slots: list[int], dtype: torch.dtype, width: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(slots), width, generator=generator, dtype=torch.float64)
    matrices = torch.randn(5, width, 16, generator=generator, dtype=torch.float64)
    return x.to(dtype), matrices.to(dtype)


def row_by_row(x: Tensor, matrices: Tensor, slots: list[int]) -> Tensor:
    pairs = zip(x.double(), slots, strict=True)
    made = [row @ matrices[slot].double() for row, slot in pairs]
    return torch.stack(made) if made else torch.empty(0, matrices.shape[2]).double()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_equals_its_twin(dtype: torch.dtype, order: str) -> None:
    slots = ORDERS[order]
    x, matrices = given(slots, dtype)
    exact = row_by_row(x, matrices, slots)
    for function in (stacked_product, stacked_product_reference):
        y = function(x, matrices, Rows(slots))
        assert y.dtype == dtype and y.shape == exact.shape
        room = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
        assert (y.double() - exact).norm() <= room * exact.norm()  # of bf16: one rounding


def test_long_runs_are_products_and_short_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    twin = stacked.stacked_product_reference

    def counting(x: Tensor, matrices: Tensor, rows: Rows) -> Tensor:
        calls.append(len(rows.runs))
        return twin(x, matrices, rows)

    monkeypatch.setattr(stacked, "stacked_product_reference", counting)
    for order in ORDERS:
        x, matrices = given(ORDERS[order], torch.float32)
        stacked_product(x, matrices, Rows(ORDERS[order]))
    assert calls == [3, 0]


def test_what_lies_in_other_slots_is_not_read() -> None:
    x, matrices = given([1, 3], torch.float32)
    right = stacked_product(x, matrices, Rows([1, 3]))
    matrices[[0, 2, 4]] = torch.nan
    assert torch.equal(stacked_product(x, matrices, Rows([1, 3])), right)


def test_rows_of_half_a_vector_are_summed_in_fp32() -> None:
    """Thousands of equal terms: sums in bf16 would stand still at 256."""
    x = torch.ones(2, 4096).bfloat16()
    matrices = torch.ones(2, 4096, 8).bfloat16()
    assert torch.equal(
        stacked_product(x, matrices, Rows([1, 0])), torch.full((2, 8), 4096.0).bfloat16()
    )


def test_x_has_a_gradient() -> None:
    x, matrices = given(ORDERS["any order"], torch.float64)
    rows = Rows(ORDERS["any order"])
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: stacked_product(x, matrices, rows), (x,))
