"""A layer in few bits computes, forward and backward, what a dense layer with the same rounded weight computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.frozen.eightbit import Fp8Linear, Int8Linear
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.lowbit import LowBitLinear


@pytest.mark.parametrize("kind", [FourBitLinear, Int8Linear, Fp8Linear])
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 128)], ids=len)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen bias", "trained bias"])
def test_it_is_a_linear_layer(
    kind: type[LowBitLinear], shape: tuple[int, ...], trained: bool
) -> None:
    dense = nn.Linear(128, 24)
    assert dense.bias is not None
    dense.bias.requires_grad_(trained)
    small = kind.of(dense.weight, dense.bias)  # type: ignore[attr-defined]
    dense.weight = nn.Parameter(small.dense(torch.float32), requires_grad=False)

    found = []
    for layer in (small, dense):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append((y, x.grad, layer.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_a_gradient_that_nobody_asked_for_is_not_made() -> None:
    dense = nn.Linear(128, 24)
    small = FourBitLinear.of(dense.weight.detach(), dense.bias)
    unpacked = []
    small.dense = lambda dtype: unpacked.append(dtype) or dense.weight.to(dtype)  # type: ignore[method-assign,assignment,func-returns-value]
    small(torch.randn(3, 128)).sum().backward()
    assert len(unpacked) == 1, "once in the forward, for nothing in the backward"


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_what_it_gives_may_be_written_in_place(
    storage: str, shape: tuple[int, ...], biased: bool
) -> None:
    """Falcon adds its residual so."""
    bias = torch.randn(64) if biased else None
    layer = FORMATS[storage](torch.randn(64, 128), bias)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.nn.functional.linear(x, layer.dense(torch.float32), bias) + 1
    y = layer(x)
    y += 1
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dense(torch.float32).sum(0).expand(shape))
