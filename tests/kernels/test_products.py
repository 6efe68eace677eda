"""Products in fp32 of bf16 matrices: nearer to the truth than bf16's own, whatever their sizes; only where asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adapt.lean import Lean
from trimtab.frozen.formats import maker
from trimtab.kernels import products


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where fp32 is faster, and blocks of which even small matrices have several."""
    monkeypatch.setattr(products, "fp32_is_faster", lambda: True)
    monkeypatch.setattr(products, "ROWS", 100)


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def off(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize("block", [1 << 22, 300, 1])
@pytest.mark.parametrize("rows", [64, 100, 257])
def test_they_are_nearer_to_the_truth(rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(products, "BLOCK", block)
    x, weight, bias, y = draws((rows, 48), (37, 48), (37,), (rows, 37))
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert off(products.linear(x, weight, bias), truth) <= off(F.linear(x, weight, bias), truth)
    assert products.linear(x, weight).dtype == torch.bfloat16
    truth = y.double() @ weight.double()
    assert off(products.times(y, weight), truth) <= 1.01 * off(y @ weight, truth)


def test_shapes_and_strides() -> None:
    x, weight = draws((5, 30, 48), (37, 48))
    flat = products.linear(x.flatten(0, 1), weight).view(5, 30, 37)
    assert torch.equal(products.linear(x, weight), flat)
    turned = x.transpose(0, 1)
    assert torch.equal(products.linear(turned, weight), flat.transpose(0, 1))
    products.linear(x, weight).add_(1)  # nobody is forbidden to write into it


def test_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draws((63, 48), (37, 48))
    assert not products.widens(x), "few rows: widening the weight costs more than it gains"
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    many = x.repeat(2, 1)
    assert products.widens(many) and not products.widens(many.float())
    monkeypatch.setattr(products, "fp32_is_faster", lambda: False)
    assert torch.equal(products.linear(many, weight), F.linear(many, weight))
    assert torch.equal(products.times(many @ weight.T, weight), many @ weight.T @ weight)


@pytest.mark.parametrize(
    ("name", "flags", "faster"),
    [
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": True}, False),
        ("Intel Xeon", {"avx512_bf16": True}, True),
        ("Intel Core i5", {}, True),
        ("AMD EPYC", {"avx512_bf16": True}, False),
        ("AMD EPYC", {}, True),
    ],
)
def test_which_machines(
    name: str, flags: dict[str, bool], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    known = {"architecture": "x86_64", "cpu_name": name, **flags}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert products.fp32_is_faster.__wrapped__() is faster
    known["architecture"] = "aarch64"
    assert not products.fp32_is_faster.__wrapped__()


def test_layers_inside_a_lean_forward() -> None:
    """Frozen ones, in autocast too; a trained one is torch's."""
    model = nn.Sequential(nn.Linear(48, 37), nn.Linear(37, 16, bias=False)).bfloat16()
    model.requires_grad_(False)
    (x,) = draws((4, 50, 48))
    x.requires_grad_()
    truth = model.double()(x.double())
    truth.square().sum().backward()
    right, x.grad = x.grad, None
    model.bfloat16()
    found = {}
    for way in ("torch", "ours", "autocast"):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            given = x.float() if way == "autocast" else x
            if way == "torch":
                y = model(given)
            else:
                with Lean(model):
                    y = model(given)
                    assert "FrozenLinear" in type(y.grad_fn).__name__ + str(
                        y.grad_fn.next_functions
                    )
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert right is not None and x.grad is not None
        found[way], x.grad = (off(y.detach(), truth.detach()), off(x.grad, right)), None
    assert all(a <= 1.05 * b for a, b in zip(found["ours"], found["torch"], strict=True))
    assert all(a <= 1.05 * b for a, b in zip(found["autocast"], found["torch"], strict=True))
    model[0].requires_grad_(True)
    with Lean(model):
        model(x).float().sum().backward()
    assert model[0].weight.grad is not None


def test_a_gradient_of_a_gradient() -> None:
    """Of a dense layer and of one in few bits: torch takes what somebody differentiates."""
    (weight,) = draws((37, 64))
    few = maker("int8")(weight, None)
    layers = {
        "dense": (weight, lambda x: products.frozen_linear(x, weight)),
        "int8": (few.dense(torch.bfloat16), few),
    }
    for own, layer in layers.values():
        found = []
        for product in (layer, lambda x, own=own: F.linear(x, own)):
            x, y = (t.requires_grad_() for t in draws((100, 64), (100, 37)))
            (first,) = torch.autograd.grad(product(x), x, y, create_graph=True)
            found.append(torch.autograd.grad(first.float().square().sum(), y)[0])
        assert torch.equal(*found)
