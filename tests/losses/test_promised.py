"""Promised logits are logits: whatever is done with them gives what the real ones give, with its gradient."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.losses import promised_logits
from trimtab.losses.promised import PromisedLogits

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 7, 8, 40


def logits(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of the same hidden states, promised or real; and these."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    states = hidden * 1.5
    if kind == "real":
        return F.linear(states, head, bias), hidden
    return promised_logits(states, head, bias), hidden


def targets() -> Tensor:
    found = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    found[0, :4] = found[2] = -100
    return found


class Doubled(torch.autograd.Function):
    """A function of somebody else, whose code sees values alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Tensor:
        return outer[0] * 2


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x.detach(), file)
    file.seek(0)
    found: Tensor = torch.load(file)
    return found


def masked(x: Tensor) -> Tensor:
    y = x * 1
    y[..., 5:] = -9.0
    return y


def changed(x: Tensor) -> Tensor:
    view, copied = x.view(-1, VOCABULARY), x.float()
    x[..., 5:] = -9.0
    return torch.stack([x, view.view_as(x), copied.to(x.dtype), x.float().to(x.dtype)])


def halved(x: Tensor) -> Tensor:
    x /= 2
    return x.softmax(-1)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "capped": lambda x: torch.tanh(x / 30) * 30,
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax of a shifted float": lambda x: x[..., :-1, :].contiguous().float().softmax(-1),
    "view": lambda x: x.view(-1, VOCABULARY) * 2,
    "view of another last axis": lambda x: x.view(ROWS, -1) * 2,
    "sizes": lambda x: x.reshape(x.shape[0] * x.size(1), x.shape[-1]).exp(),
    "one position": lambda x: x[:, -1],
    "positions": lambda x: x[torch.arange(ROWS), torch.tensor([1, 2, 3])],
    "gather": lambda x: x.gather(-1, targets().clamp(min=0)[..., None]),
    "cat": lambda x: torch.cat([x, x.float().to(x.dtype)]),
    "in place": halved,
    "an item": masked,
    "an item of itself": changed,
    "a function of another library": Doubled.apply,  # type: ignore[dict-item]
    "deep copy": lambda x: copy.deepcopy(x.detach()),
    "saved": saved,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "argmax": lambda x: x.argmax(-1).double(),
    "as another dtype": lambda x: x.to(torch.bfloat16).double(),
    "cross-entropy, weighted": lambda x: F.cross_entropy(
        x.view(-1, VOCABULARY), targets().view(-1), torch.arange(1.0, VOCABULARY + 1).double()
    ),
    "cross-entropy of each": lambda x: F.cross_entropy(
        x.view(-1, VOCABULARY), targets().view(-1), reduction="none"
    ),
    "cross-entropy of classes first": lambda x: F.cross_entropy(x.mT, targets()),
    "cross-entropy of shares": lambda x: F.cross_entropy(
        x.view(-1, VOCABULARY), x.detach().view(-1, VOCABULARY).softmax(-1)
    ),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_is_done_with_them(use: str) -> None:
    values, gradients = [], []
    for kind in ("real", "promised"):
        x, hidden = logits(kind)
        assert isinstance(x, PromisedLogits) == (kind == "promised")
        found = USES[use](x)
        assert not isinstance(found, PromisedLogits)
        values.append(found.detach())
        if found.requires_grad:
            found.sin().sum().backward()
            gradients.append(hidden.grad)
    assert torch.equal(*values)
    if gradients:
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_what_is_known_without_them() -> None:
    (x, _), (real, _) = logits("promised"), logits("real")
    assert x.shape == real.shape
    assert (x.dtype, x.device, x.ndim, len(x)) == (real.dtype, real.device, real.ndim, len(real))
    assert x.requires_grad and x.is_floating_point() and not x.is_leaf and x.numel() == real.numel()
    assert x._made is None
    assert repr(x.detach()) == repr(real.detach())


def shifted(x: Tensor, labels: Tensor) -> Tensor:
    """As earlier releases of transformers and models' own code do it."""
    flat = x[..., :-1, :].contiguous().view(-1, VOCABULARY)
    return nn.CrossEntropyLoss()(flat, labels[..., 1:].contiguous().view(-1))


def padded(x: Tensor, labels: Tensor) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(x, labels, VOCABULARY, num_items_in_batch=torch.tensor(11))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, labels: F.cross_entropy(x.view(-1, VOCABULARY), labels.view(-1)),
    "sum": lambda x, labels: F.cross_entropy(
        x.view(-1, VOCABULARY), labels.view(-1), reduction="sum"
    ),
    "another ignored": lambda x, labels: F.cross_entropy(
        x.reshape((-1, VOCABULARY)), labels.clamp(min=0).view(-1), ignore_index=0
    ),
    "smoothed": lambda x, labels: F.cross_entropy(
        x.view(-1, VOCABULARY), labels.view(-1), label_smoothing=0.1
    ),
    "shifted": shifted,
    "transformers": padded,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_cross_entropy_makes_no_logits(loss: str, dtype: torch.dtype) -> None:
    found = []
    for kind in ("real", "promised"):
        x, hidden = logits(kind, dtype)
        value = LOSSES[loss](x, targets())
        (gradient,) = torch.autograd.grad(value, hidden)
        found.append((value.detach(), gradient))
        assert kind == "real" or x._made is None
    (value, gradient), (ours, own) = found
    assert ours.dtype == value.dtype
    close = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours, value, rtol=close, atol=close)
    assert (own - gradient).norm() <= close * gradient.norm()


class Largest(TorchDispatchMode):
    """The most elements that any operation gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not isinstance(found, PromisedLogits):
            self.most = max(self.most, found.numel())
        return found


def test_no_operation_gives_as_much_as_the_logits() -> None:
    """Where few positions have a label."""
    x, hidden = logits("promised")
    labels = torch.full((ROWS, TOKENS), -100)
    labels[1, 3] = 5
    with Largest() as seen:
        padded(x, labels).backward()
    assert hidden.grad is not None and hidden.grad[1, 2].any()
    assert seen.most < ROWS * TOKENS * VOCABULARY


def test_on_the_meta_device() -> None:
    """Where memory is planned; autocast does not know it."""
    hidden = torch.randn(2, 3, 8, device="meta", requires_grad=True)
    x = promised_logits(hidden, torch.randn(40, 8, device="meta"), None)
    assert x.view(-1, 40).shape == (6, 40) and (x * 2).device.type == "meta"


def test_no_label_at_all() -> None:
    x, _ = logits("promised")
    nothing = torch.full((ROWS * TOKENS,), -100)
    flat = x.view(-1, VOCABULARY)
    assert F.cross_entropy(flat, nothing).isnan()
    assert F.cross_entropy(flat, nothing, reduction="sum") == 0


def test_a_loss_after_a_change_is_of_what_was_changed() -> None:
    losses = []
    for kind in ("real", "promised"):
        x, hidden = logits(kind)
        x[..., 7:] = -50.0
        loss = padded(x, targets())
        losses.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    torch.testing.assert_close(*losses)


def test_under_autocast() -> None:
    """The head runs in the dtype of autocast, cross-entropy in fp32, wherever the logits are looked at."""
    found = []
    for kind in ("real", "promised"):
        with torch.autocast("cpu", torch.bfloat16):
            x, hidden = logits(kind, torch.float32)
            assert x.dtype == torch.bfloat16
            loss = F.cross_entropy(x.view(-1, VOCABULARY), targets().view(-1))
        (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        assert loss.dtype == gradient.dtype == torch.float32
        found.append((loss.detach(), gradient, x * 1))
    (loss, gradient, real), (ours, own, made) = found
    assert torch.equal(real, made)
    torch.testing.assert_close(ours, loss, rtol=1e-3, atol=1e-3)
    assert (own - gradient).norm() <= 2e-2 * gradient.norm()


def test_what_is_looked_at_without_gradients_has_its_graph_later() -> None:
    x, hidden = logits("promised")
    with torch.no_grad():
        assert not x.float().requires_grad
    x.sum().backward()
    assert hidden.grad is not None and hidden.grad.any()


@pytest.mark.parametrize("late", [False, True])
def test_whoever_watches_their_gradient_sees_it(late: bool) -> None:
    """Hooks and kept gradients, also where they are asked for after the loss."""
    found = []
    for kind in ("real", "promised"):
        x, hidden = logits(kind)
        seen: list[Tensor] = []

        def watch(x: Tensor = x, seen: list[Tensor] = seen) -> None:
            x.retain_grad()
            x.register_hook(lambda gradient: [seen.append(gradient), gradient * 2][1])

        loss = None if late else watch()
        loss = padded(x, targets())
        if late:
            watch()
        loss.backward()
        assert hidden.grad is not None and x.grad is not None
        found.append((x.grad, hidden.grad, *seen))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_gradient_of_the_gradient() -> None:
    found = []
    for kind in ("real", "promised"):
        x, hidden = logits(kind)
        loss = F.cross_entropy(x.view(-1, VOCABULARY), targets().view(-1))
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), hidden)
        found.append(second)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
