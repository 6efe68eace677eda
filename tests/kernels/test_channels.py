"""Channels stretched by blocks of rows, beside torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.kernels import frozen_blocks
from trimtab.kernels.channels import stretched


def drawn(dtype: torch.dtype, shape: tuple[int, ...] = (3, 50, 24)) -> tuple[Tensor, ...]:
    """y, c, b and the gradient of z."""
    generator = torch.Generator().manual_seed(0)
    y, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    c, b = (torch.randn(shape[-1:], generator=generator) for _ in range(2))
    return y.requires_grad_(), c.requires_grad_(), b.to(dtype), grad


def exact(y: Tensor, c: Tensor, b: Tensor | None, grad: Tensor) -> list[Tensor]:
    y, c = (t.detach().double().requires_grad_() for t in (y, c))
    z = y + c * (y if b is None else y - b.double())
    return [z.detach(), *torch.autograd.grad(z, (y, c), grad.double())]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(
    dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_blocks, "BLOCK", 24 * 7)
    y, c, b, grad = drawn(dtype)
    bias = b if biased else None
    z = stretched(y, c, bias)
    found = [z.detach(), *torch.autograd.grad(z, (y, c), grad)]
    within = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
    for mine, other in zip(found, exact(y, c, bias, grad), strict=True):
        assert (mine.double() - other).norm() <= within[dtype] * other.norm()
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]


def test_no_change_changes_no_bit() -> None:
    y, c, b, _ = drawn(torch.bfloat16)
    assert torch.equal(stretched(y, torch.zeros_like(c), b), y)


def test_gradients_of_gradients() -> None:
    """Of fp32, which goes by blocks: as torch's own."""
    found = []
    for way in (stretched, lambda y, c, b: y + c * (y - b)):
        y, c, b, grad = drawn(torch.float32, (5, 24))
        first = torch.autograd.grad(way(y, c, b), (y, c), grad, create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), (y, c)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_kernels_of_convolutions_and_what_is_not_trained() -> None:
    y = torch.randn(2, 4, 5, 5, requires_grad=True)
    c = torch.randn(4, 1, 1)
    assert torch.allclose(stretched(y, c), y + c * y)
    y, c, b, grad = drawn(torch.float32)
    (dc,) = torch.autograd.grad(stretched(y.detach(), c, b), c, grad)
    assert torch.allclose(dc.double(), exact(y, c, b, grad)[2], rtol=1e-4)
