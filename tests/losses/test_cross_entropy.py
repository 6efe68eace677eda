"""The chunked form equals the plain one, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.losses import Form, TokenLoss, linear_cross_entropy, weighted_cross_entropy
from trimtab.losses.cross_entropy import PLAIN


def problem(dtype: torch.dtype, tokens: int = 23, vocabulary: int = 41) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, 16, dtype=dtype)
    targets = torch.randint(vocabulary, (tokens,))
    weights = torch.rand(tokens)
    return hidden, head, targets, weights, torch.randn(vocabulary, dtype=dtype)


FORMS = [PLAIN, Form(smoothing=0.1), Form(z_loss=0.01), Form(cap=3.0), Form(0.2, 0.05, 2.0)]


def both(
    dtype: torch.dtype, chunk: int, *, bias: bool, form: Form = PLAIN
) -> tuple[list[Tensor], list[Tensor], TokenLoss]:
    hidden, head, targets, weights, offset = problem(dtype)
    logits = hidden @ head.T + (offset if bias else 0)
    plain = weighted_cross_entropy(logits, targets, weights, form)
    (want,) = torch.autograd.grad(3 * plain.loss, hidden)
    fused = linear_cross_entropy(
        hidden, head, targets, weights, offset if bias else None, form, chunk=chunk
    )
    (got,) = torch.autograd.grad(3 * fused.loss, hidden)
    return [plain.loss, plain.nll, want], [fused.loss, fused.nll, got], fused


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_equals_plain(chunk: int, bias: bool, form: Form) -> None:
    plain, fused, result = both(torch.float64, chunk, bias=bias, form=form)
    for want, got in zip(plain, fused, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    hidden, head, targets, weights, offset = problem(torch.float64)
    logits = hidden @ head.T + (offset if bias else 0)
    assert torch.equal(result.best, weighted_cross_entropy(logits, targets, weights).best)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_plain_form_is_its_formula(form: Form) -> None:
    hidden, head, targets, weights, _ = problem(torch.float64)
    z = hidden.detach() @ head.T
    z = z if form.cap is None else form.cap * torch.tanh(z / form.cap)
    shares = torch.log_softmax(z, -1)
    spread = torch.full_like(z, form.smoothing / z.shape[1])
    spread[torch.arange(len(z)), targets] += 1 - form.smoothing
    each = -(spread * shares).sum(-1) + form.z_loss * torch.logsumexp(z, -1) ** 2
    found = weighted_cross_entropy(hidden @ head.T, targets, weights, form)
    torch.testing.assert_close(found.each.detach(), each)
    torch.testing.assert_close(found.nll, -shares[torch.arange(len(z)), targets])


def test_losses_of_log_probabilities_have_their_gradient_without_logits() -> None:
    """A preference loss: what counts of a token is not known before all are computed."""
    hidden, head, targets, weights, _ = problem(torch.float64)

    def preferred(each: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(0.1 * (each[12:].sum() - each[:12].sum()))

    plain = weighted_cross_entropy(hidden @ head.T, targets, weights).each
    (want,) = torch.autograd.grad(preferred(plain), hidden)
    fused = linear_cross_entropy(hidden, head, targets, weights, chunk=5).each
    (got,) = torch.autograd.grad(preferred(fused), hidden)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bfloat16_stays_within_rounding(form: Form) -> None:
    plain, fused, _ = both(torch.bfloat16, 7, bias=False, form=form)
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(fused[2], plain[2], rtol=3e-2, atol=6e-2)


def test_gradcheck() -> None:
    hidden, head, targets, weights, offset = problem(torch.float64, tokens=5, vocabulary=7)
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, head, targets, weights, offset, chunk=2).loss, (hidden,)
    )


def test_sure_of_the_target_the_gradient_keeps_its_digits() -> None:
    """In bfloat16 a probability of 0.999 minus one would be 0 or −0.004."""
    head = torch.eye(8, 16).to(torch.bfloat16)
    hidden = torch.zeros(1, 16, dtype=torch.bfloat16)
    hidden[0, 3] = 9
    hidden.requires_grad_()
    token = linear_cross_entropy(hidden, head, torch.tensor([3]), torch.ones(1))
    (gradient,) = torch.autograd.grad(token.loss, hidden)
    exact = torch.softmax(hidden.detach().float()[0, :8], 0)[3] - 1
    assert abs(float(gradient[0, 3]) / float(exact) - 1) < 0.01


def test_nothing_is_averaged() -> None:
    hidden, head, targets, weights, _ = problem(torch.float64)
    whole = linear_cross_entropy(hidden, head, targets, weights).loss
    parts = sum(
        linear_cross_entropy(hidden[p], head, targets[p], weights[p]).loss
        for p in (slice(0, 9), slice(9, None))
    )
    torch.testing.assert_close(parts, whole)


def test_no_gradient_is_made_where_none_is_asked() -> None:
    hidden, head, targets, weights, _ = problem(torch.float32)
    with torch.no_grad():
        token = linear_cross_entropy(hidden, head, targets, weights)
    assert not token.loss.requires_grad
