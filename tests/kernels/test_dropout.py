"""Dropout: how often, of what, the same in backward, and governed by torch's generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.kernels.dropout import Masks, dropout
from trimtab.kernels.remade import remaking


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.5, 0.93])
def test_elements_are_dropped_with_the_probability_asked_for(share: float) -> None:
    count, rows = 1 << 22, 1 << 12
    mask = Masks(share, 1).next_like(torch.empty(rows, count // rows))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    spread = (share * (1 - share) / count + 1 / 256**2 / rows) ** 0.5
    assert abs(float((mask == 0).double().mean()) - share) < 5 * spread
    both = float(((mask[:, 1:] == 0) & (mask[:, :-1] == 0)).double().mean())
    assert abs(both - share**2) < 5 * spread + 1 / 256**2  # neighbours know nothing of each other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 70, 24), (5,), (2, 100_003)])
def test_what_is_left_is_scaled_up_and_so_are_its_gradients(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (torch.rand(shape, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    y = dropout(x, 0.3)
    assert y.dtype == dtype and y.shape == x.shape
    mask = y != 0
    torch.testing.assert_close(y.double(), x.double() / 0.7 * mask, rtol=0.01, atol=0)
    outer = torch.rand(shape, dtype=torch.float64).to(dtype) + 1
    (grad,) = torch.autograd.grad(y, x, outer)
    assert torch.equal(grad != 0, mask)
    torch.testing.assert_close(grad.double(), outer.double() / 0.7 * mask, rtol=0.01, atol=0)


def test_gradients_of_gradients() -> None:
    x = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)

    def squares(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dropout(x, 0.4) ** 3

    assert torch.autograd.gradcheck(squares, x)
    assert torch.autograd.gradgradcheck(squares, x)


def test_the_seed_is_torch_s_and_checkpoints_draw_the_same() -> None:
    x = torch.rand(40, 50, requires_grad=True)
    torch.manual_seed(0)
    first = dropout(x, 0.5)
    second = dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    y = checkpoint(lambda x: dropout(x, 0.5) ** 2, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, y == 0)


def test_neither_a_mask_nor_what_it_leaves_is_kept() -> None:
    x, weight = torch.rand(64, 32, requires_grad=True), torch.rand(32, 16, requires_grad=True)
    kept: list[Tensor] = []
    with remaking():
        y = dropout(x, 0.5)
        z = y @ weight
    dropped = y.detach().clone()
    del y
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        dropout(x, 0.5)
    assert not kept
    (grad,) = torch.autograd.grad(z.sum(), weight)
    torch.testing.assert_close(grad, dropped.T @ torch.ones(64, 16))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_all(share: float) -> None:
    x = torch.rand(4, 5)
    assert torch.equal(dropout(x, share), x * (1 - share))
    assert dropout(torch.empty(0, 5), 0.5).shape == (0, 5)
