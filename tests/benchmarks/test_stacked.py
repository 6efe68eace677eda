"""The comparison of steps with adapters in slots: its ways are the same product, and its table says what was found."""

from __future__ import annotations

import torch

from benchmarks import stacked
from tests import tiny
from trimtab.kernels.stacked import Rows


def test_all_ways_are_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator)
    matrices = torch.randn(5, 12, 8, generator=generator)
    right = torch.stack([row @ matrix for row, matrix in zip(x, matrices, strict=True)])
    for name, way in stacked.WAYS.items():
        torch.testing.assert_close(way(x, matrices, Rows(range(5))), right, msg=name)


def test_a_small_model_is_measured() -> None:
    base = tiny.llama(max_position_embeddings=256).bfloat16()
    found = stacked.measured(base, rounds=1, layers=1)
    sides = list(found["ratios"])
    assert sides[0] == stacked.BASE and found["ratios"][stacked.BASE] == [1.0]
    assert [side.partition(",")[0] for side in sides[1:]] == ["in slots", "in slots", "by parts"]
    few, many = found["adapter_bytes"].values()
    assert few == 2 * 32 * 3 * 8 * (2 * 32 + 32 + 16) < many
    text = stacked.table(found)
    assert all(f"| {side} |" in text for side in sides)
    assert 0 < stacked.bounds(found, "r=16, all linear layers")["by bytes"] < 1
