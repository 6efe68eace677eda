"""What is made again instead of kept: it is not kept, it comes back the same, and a change in between is noticed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from trimtab.kernels import remade as remade_module
from trimtab.kernels.remade import remade, remaking


def source() -> Tensor:
    return torch.linspace(-2, 2, 24).view(2, 3, 4).requires_grad_()


def doubled(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return doubled(x)


def test_it_is_made_once_for_all_that_need_it() -> None:
    x, make, found = source().detach(), Counted(), []
    for again in (True, False):
        own = [torch.full((5, 4), float(n + 1)).requires_grad_() for n in range(3)]
        with remaking():
            y = remade(doubled(x), make, x) if again else doubled(x)
            loss = torch.stack([F.linear(y, weight).square().sum() for weight in own]).sum()
        loss.backward()
        found.append([weight.grad for weight in own])
    assert make.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_another_stream_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = iter([1, 2, 2])
    monkeypatch.setattr(remade_module, "_stream", lambda device: next(streams))
    x, make = source().detach(), Counted()
    own = [torch.ones(5, 4, requires_grad=True) for _ in range(3)]
    with remaking():
        y = remade(doubled(x), make, x)
        loss = torch.stack([F.linear(y, weight).sum() for weight in own]).sum()
    loss.backward()
    assert make.calls == 2
    assert all(torch.equal(weight.grad, own[0].grad) for weight in own)  # type: ignore[arg-type]


def test_the_memory_is_free_between_forward_and_backward() -> None:
    x, weight = source(), torch.ones(5, 4, requires_grad=True)
    frozen = doubled(x.detach())
    with remaking():
        y = remade(frozen * 1, doubled, x)
        storage = StorageWeakRef(y.untyped_storage())
        out = F.linear(y, weight)
        del y
        assert storage.expired()
    out.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], doubled(x.detach()).sum((0, 1)))


def test_a_graph_that_nobody_goes_back_through_is_freed() -> None:
    """Also where an operation keeps what it gives."""
    x = torch.randn(4, requires_grad=True)
    with remaking():
        y = x.softmax(-1).exp()
    storage = StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()


def test_views_come_back_as_views() -> None:
    x, found = source().detach(), []
    for again in (True, False):
        one, other = (torch.ones(shape, requires_grad=True) for shape in ((4, 3, 2), (2, 2, 2)))
        with remaking():
            y = remade(doubled(x), doubled, x) if again else doubled(x)
            loss = (y.transpose(0, 2) * one).sum() + (y[:, 1:, ::2] * other).sum()
        loss.backward()
        found += [one.grad, other.grad]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])  # type: ignore[arg-type]


def test_what_was_changed_since_is_kept_as_it_is() -> None:
    x = source().detach()
    weight = torch.ones(5, 4, requires_grad=True)
    with remaking():
        y = remade(doubled(x), doubled, x)
        y.mul_(3)
        out = F.linear(y, weight)
    out.sum().backward()
    torch.testing.assert_close(weight.grad[0], 3 * doubled(x).sum((0, 1)))  # type: ignore[index]


def test_a_changed_source_is_noticed() -> None:
    for early in (True, False):
        x = source().detach().clone()
        weight = torch.ones(5, 4, requires_grad=True)
        with remaking():
            y = remade(doubled(x), doubled, x)
            right = y.sum((0, 1))
            if early:  # before it is needed: then it is kept as it is
                x.zero_()
            out = F.linear(y, weight)
        if early:
            out.sum().backward()
            torch.testing.assert_close(weight.grad[0], right)  # type: ignore[index]
        else:
            x.zero_()
            with pytest.raises(RuntimeError, match="changed in place"):
                out.sum().backward()


def test_a_kept_tensor_that_was_changed_is_noticed_as_torch_does() -> None:
    x, weight = source().detach(), torch.ones(5, 4, requires_grad=True)
    with remaking():
        out = F.linear(x, weight)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_it_may_be_asked_for_twice() -> None:
    x, weight = source().detach(), torch.ones(5, 4, requires_grad=True)
    with remaking():
        out = F.linear(remade(doubled(x), doubled, x), weight).sum()
    (first,) = torch.autograd.grad(out, weight, retain_graph=True)
    (second,) = torch.autograd.grad(out, weight)
    assert torch.equal(first, second)


def test_a_checkpoint_inside_keeps_nothing_for_it() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    seen = []

    def block(x: Tensor) -> Tensor:
        inner = torch.tanh(x) + 0
        seen.append(StorageWeakRef(inner.untyped_storage()))
        return F.linear(remade(doubled(inner), doubled, inner), weight)

    x = source()
    with remaking():
        for _ in range(4):
            x = checkpoint(block, x, use_reentrant=False)
        assert all(storage.expired() for storage in seen[:-1])
    x.sum().backward()
    assert weight.grad is not None and len(seen) == 8


def test_what_has_no_storage_is_kept() -> None:
    matrix = torch.eye(4).to_sparse_coo()
    x = source().detach()[0].requires_grad_()
    with remaking():
        out = torch.sparse.mm(matrix, remade(doubled(x.mT), doubled, x.mT))
    out.sum().backward()
    want = source().detach()[0].requires_grad_()
    doubled(want.mT).sum().backward()
    assert torch.equal(x.grad, want.grad)  # type: ignore[arg-type]


def test_the_same_bytes_read_as_another_dtype_are_kept() -> None:
    x, weight = source().detach(), torch.ones(2, 3, 8, requires_grad=True)
    with remaking():
        y = remade(doubled(x), doubled, x)
        halves = y.view(torch.bfloat16).float()
        out = (y.view(torch.float16) * weight).nan_to_num().sum() + halves.sum() * 0
    out.backward()
    want = doubled(x).view(torch.float16)
    torch.testing.assert_close(weight.grad.half(), want, equal_nan=True)  # type: ignore[union-attr]
