"""The compressed linear map against what its formula says: the map itself, and gradients from what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.kernels.compressed import (
    compressed_linear,
    group_width,
    mean_direction,
    reconstructed,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3, 5, 7, 12])
def test_it_is_the_map_and_learns_from_what_is_kept(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 7, dtype=dtype, requires_grad=True)
    direction = mean_direction(x.detach(), groups).to(dtype)
    assert direction.shape == (group_width(7, groups),)
    y = compressed_linear(x, weight, direction, groups, 1.5)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    gradient = torch.randn_like(y)
    y.backward(gradient)
    kept = reconstructed(x.detach(), direction, groups) * 1.5
    near = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(weight.grad, gradient.flatten(0, 1).T @ kept, **near)
    torch.testing.assert_close(x.grad, gradient @ weight.detach(), **near)


def test_one_number_for_each_feature_keeps_all() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(reconstructed(x, torch.ones(1, dtype=x.dtype), 4), x)


@pytest.mark.parametrize("x", [torch.zeros(3, 6), torch.randn(3, 6)], ids=["zeros", "drawn"])
def test_a_direction_is_one_long(x: Tensor) -> None:
    torch.testing.assert_close(mean_direction(x, 2).norm(), torch.tensor(1.0))
