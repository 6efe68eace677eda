"""A frozen layer and its low-rank change at once, beside the two one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kernels import products
from trimtab.kernels.lowrank import Change, Changed, Frozen, changed_linear

INPUTS, OUTPUTS, RANK, SCALE = 24, 40, 3, 1.7


@pytest.fixture(params=[False, True], ids=["as it is", "in fp32"])
def wide(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products of bf16 are taken in fp32, by blocks of few rows."""
    monkeypatch.setattr(products, "fp32_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "ROWS", 70)
    return bool(request.param)


def drawn(dtype: torch.dtype, rows: tuple[int, ...] = (3, 67)) -> tuple[Tensor, ...]:
    """x, W, b, A, B and the gradient of y; factors in fp32 at least."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    x, weight, bias = normal(*rows, INPUTS), normal(OUTPUTS, INPUTS), normal(OUTPUTS)
    a, b = normal(RANK, INPUTS), normal(OUTPUTS, RANK)
    factors = a.to(wide).requires_grad_(), b.to(wide).requires_grad_()
    given = x.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype)
    return *given, *factors, normal(*rows, OUTPUTS).to(dtype)


def alone(x: Tensor, weight: Any, bias: Tensor, change: Change) -> Tensor:
    (y,) = changed_linear(x, Changed(Frozen(weight, bias), [change]))
    return y


def exact(tensors: tuple[Tensor, ...], mask: Tensor | float = 1.0) -> list[Tensor]:
    """y and the gradients of x, A and B in fp64, of the same values."""
    x, weight, bias, a, b, grad = (t.detach().double() for t in tensors)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    y = F.linear(x, weight, bias) + SCALE * F.linear(F.linear(x * mask, a), b)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), grad)]


def found(tensors: tuple[Tensor, ...], share: float = 0.0, *, made: bool = False) -> list[Tensor]:
    x, weight, bias, a, b, grad = tensors
    source = (lambda dtype: weight.to(dtype)) if made else weight
    y = alone(x, source, bias, Change(a, b, SCALE, share))
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), grad)]


def near(mine: list[Tensor], other: list[Tensor], dtype: torch.dtype) -> None:
    within = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for one, two in zip(mine, other, strict=True):
        assert one.shape == two.shape
        assert (one.double() - two).norm() <= within * two.norm()


@pytest.mark.parametrize("made", [False, True], ids=["a tensor", "made when it is needed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, made: bool, wide: bool) -> None:
    tensors = drawn(dtype)
    mine = found(tensors, made=made)
    near(mine, exact(tensors), dtype)
    assert [t.dtype for t in mine] == [dtype, dtype, *(t.dtype for t in tensors[3:5])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_is_torch_s_of_what_enters_the_factors(dtype: torch.dtype, wide: bool) -> None:
    tensors = drawn(dtype)
    torch.manual_seed(5)
    mine = found(tensors, 0.4)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(tensors[0]), 0.4).detach().double()
    near(mine, exact(tensors, mask), dtype)
    assert torch.equal(torch.get_rng_state(), after)


def test_gradients_of_gradients() -> None:
    x, weight, bias, a, b, _ = drawn(torch.float64, (5,))

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return alone(x, weight, bias, Change(a, b, SCALE, 0.3))

    assert torch.autograd.gradcheck(layer, (x, a, b))
    assert torch.autograd.gradgradcheck(layer, (x, a, b))


def test_only_what_learns_gets_gradients_and_little_is_kept() -> None:
    x, weight, bias, a, b, grad = drawn(torch.float32)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        y = alone(x.detach(), weight, bias, Change(a, b.detach(), SCALE))
    own = {t.untyped_storage().data_ptr() for t in (x, weight, a, b)}
    (inner,) = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert inner.shape == (x[..., 0].numel(), RANK)
    (da,) = torch.autograd.grad(y, a, grad)
    assert torch.allclose(da, exact((x, weight, bias, a, b, grad))[2].float(), atol=1e-4)


def test_a_change_of_nothing_changes_no_bit() -> None:
    x, weight, bias, a, b, _ = drawn(torch.float32)
    y = alone(x, weight, bias, Change(a, torch.zeros_like(b), SCALE))
    assert torch.equal(y, F.linear(x, weight, bias))


def test_under_autocast_products_are_in_the_dtype_of_the_layer(wide: bool) -> None:
    tensors = drawn(torch.bfloat16)
    plain = found(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = found(tensors)
    for one, other in zip(plain, inside, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layers_that_read_the_same_x_are_computed_at_once(dtype: torch.dtype, wide: bool) -> None:
    x, weight, bias, a, b, grad = drawn(dtype)
    few = (weight[:16], bias[:16], a[:2] * 2, b[:16, :2] * 3, grad[..., :16])  # other shapes
    first = Changed(Frozen(weight, bias), [Change(a, b, SCALE)])
    second = Changed(Frozen(lambda dtype: few[0].to(dtype)), [Change(few[2], few[3], 0.4)])
    ys = changed_linear(x, first, second)
    dx, *factors = torch.autograd.grad(ys, (x, a, b), (grad, few[4]))
    y, of_first, *found = exact((x, weight, bias, a, b, grad))
    wide_x, wide_a, wide_b = (t.detach().double().requires_grad_() for t in (x, a, b))
    other = F.linear(wide_x, few[0].double())
    product = F.linear(F.linear(wide_x, wide_a[:2] * 2), wide_b[:16, :2] * 3)
    of_second = torch.autograd.grad(
        other + 0.4 * product, (wide_x, wide_a, wide_b), few[4].double()
    )
    near([*ys], [y, (other + 0.4 * product).detach()], dtype)
    both = zip((of_first, *found), of_second, strict=True)
    near([dx, *factors], [one + two for one, two in both], dtype)


def test_gradients_of_gradients_of_several_layers() -> None:
    x, weight, bias, a, b, _ = drawn(torch.float64, (4,))

    def layers(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = Changed(Frozen(weight, bias), [Change(a, b, SCALE)])
        return changed_linear(x, first, Changed(Frozen(weight * 2), [Change(a * 3, b, SCALE)]))

    assert torch.autograd.gradcheck(layers, (x, a, b))
    assert torch.autograd.gradgradcheck(layers, (x, a, b))


def test_layers_with_dropout_come_alone() -> None:
    x, weight, bias, a, b, _ = drawn(torch.float32)
    layer = Changed(Frozen(weight, bias), [Change(a, b, SCALE, 0.1)])
    with pytest.raises(ValueError, match="one by one"):
        changed_linear(x, layer, layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_segments_of_rows_have_changes_of_their_own(dtype: torch.dtype, wide: bool) -> None:
    """One, none, another, none of any row, and one that the second layer alone has."""
    x, weight, bias, a, b, grad = drawn(dtype)
    counts = [80, 30, 61, 0, 30]
    other = Change(a[:2] * 2, b[:, :2] * 3, 0.4)
    one = Change(a, b, SCALE)
    first = Changed(Frozen(weight, bias), [one, None, other, one, None])
    few = [None, None, Change(a, b[:9], 1.0), None, Change(a, b[:9], 2.0)]
    second = Changed(Frozen(weight[:9] * 2), few)
    ys = changed_linear(x, first, second, counts=counts)
    got = torch.autograd.grad(ys, (x, a, b), (grad, grad[..., :9]))
    wx, wa, wb = (t.detach().double().requires_grad_() for t in (x, a, b))

    def change(rows: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return scale * F.linear(F.linear(rows, a), b)

    flat = wx.flatten(0, -2)
    want = [F.linear(wx, weight.double(), bias.double()), F.linear(wx, weight[:9].double() * 2)]
    moved = [torch.zeros_like(y.flatten(0, -2)) for y in want]
    moved[0][:80] = change(flat[:80], wa, wb, SCALE)
    moved[0][110:171] = change(flat[110:171], wa[:2] * 2, wb[:, :2] * 3, 0.4)
    moved[1][110:171] = change(flat[110:171], wa, wb[:9], 1.0)
    moved[1][171:] = change(flat[171:], wa, wb[:9], 2.0)
    want = [y + m.view_as(y) for y, m in zip(want, moved, strict=True)]
    near([*ys], [y.detach() for y in want], dtype)
    slopes = (grad.double(), grad[..., :9].double())
    near([*got], [*torch.autograd.grad(want, (wx, wa, wb), slopes)], dtype)


def test_gradients_of_gradients_of_segments() -> None:
    x, weight, bias, a, b, _ = drawn(torch.float64, (5,))

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        changes = [Change(a, b, SCALE), None, Change(a * 3, b, 0.5)]
        (y,) = changed_linear(x, Changed(Frozen(weight, bias), changes), counts=[2, 1, 2])
        return y

    assert torch.autograd.gradcheck(layer, (x, a, b))
    assert torch.autograd.gradgradcheck(layer, (x, a, b))
