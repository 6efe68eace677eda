"""Attention to pages: as row by row, wherever the pages lie and whatever lies in the others."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from trimtab.kernels.paged import DENSE, Entries, paged_attention, reference

HEADS, GROUPS, WIDTH, SIZE = 6, 2, 16, 8
SCALE = WIDTH**-0.5


def drawn(pages: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    keys, values = torch.randn(2, pages, GROUPS, SIZE, WIDTH, dtype=torch.float64)
    return keys.to(dtype), values.to(dtype)


def both(
    tables: list[list[int]], lengths: list[int], pages: int, window: int | None = None
) -> tuple[Tensor, Tensor]:
    keys, values = drawn(pages)
    q = torch.randn(len(tables), HEADS, WIDTH, dtype=torch.float64)
    entries = Entries.of(tables, lengths, SIZE, keys, window)
    found = paged_attention(q, keys, values, entries, SCALE)
    return found, reference(q, keys, values, tables, lengths, SCALE, window)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 13])
def test_rows_of_any_length_and_pages_in_any_order(window: int | None) -> None:
    pages = list(range(20))
    random.Random(1).shuffle(pages)
    lengths = [1, 8, 9, 40, 17]
    tables = []
    for length in lengths:
        count = -(-length // SIZE)
        tables.append([pages.pop() for _ in range(count)])
    torch.testing.assert_close(*both(tables, lengths, 20, window), rtol=1e-12, atol=1e-12)


def test_pages_that_several_rows_read() -> None:
    tables = [[0, 1, 2], [0, 1, 3], [0, 4], [5]]
    torch.testing.assert_close(*both(tables, [20, 18, 16, 3], 6), rtol=1e-12, atol=1e-12)


def test_few_pages_of_many_are_copied() -> None:
    tables = [[37, 2], [30]]
    entries = Entries.of(tables, [12, 8], SIZE, drawn(40)[0])
    assert entries.extent == 0 and len(entries.pages) == 3 < DENSE * 38
    torch.testing.assert_close(*both(tables, [12, 8], 40), rtol=1e-12, atol=1e-12)


def test_what_lies_in_free_pages_or_behind_a_text_is_nobodys() -> None:
    keys, values = drawn(5)
    q = torch.randn(2, HEADS, WIDTH, dtype=torch.float64)
    tables, lengths = [[0, 2], [4]], [11, 8]
    entries = Entries.of(tables, lengths, SIZE, keys)
    assert entries.extent == 5
    clean = paged_attention(q, keys, values, entries, SCALE)
    for tensor in (keys, values):
        tensor[[1, 3]] = float("nan")
    keys[2, :, 3:] = 1e30
    assert torch.equal(paged_attention(q, keys, values, entries, SCALE), clean)


def test_bf16_is_no_worse_than_torch() -> None:
    keys, values = drawn(8, torch.bfloat16)
    q = torch.randn(2, HEADS, WIDTH, dtype=torch.bfloat16)
    tables, lengths = [[0, 1, 2, 3], [4, 5, 6, 7]], [32, 29]
    entries = Entries.of(tables, lengths, SIZE, keys)
    exact = reference(q.double(), keys.double(), values.double(), tables, lengths, SCALE)
    ours = paged_attention(q, keys, values, entries, SCALE)
    torchs = reference(q, keys, values, tables, lengths, SCALE)
    assert ours.dtype == torch.bfloat16
    error, theirs = ((t.double() - exact).square().mean() for t in (ours, torchs))
    assert error <= 1.5 * theirs
