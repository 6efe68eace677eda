"""Cross-entropy as a sum over weighted tokens; nothing is averaged here.

    loss = Σ_n w_n · l_n,   l_n = L_n − (1 − ε) z_n[t_n] − ε · mean z_n + ζ · L_n²,   L_n = logsumexp(z_n)

with ε label smoothing (arXiv 1512.00567), ζ that of a z-loss (arXiv 2204.02311), both 0 where nothing is said, and
logits z = u, or z = c · tanh(u / c) where a model caps them softly at c.

`weighted_cross_entropy` is the plain form. `linear_cross_entropy` takes the hidden states before a
frozen output head and never holds all logits: it goes by chunks of tokens and forms the gradient of
the hidden states in the forward pass, where the chunk's probabilities are at hand,

    ∂l_n/∂h_n = ((1 + 2 ζ L_n) · softmax(z_n) − (1 − ε) · onehot(t_n) − ε / V) ∘ (1 − (z_n / c)²) W,

so that backward is one multiplication, of each token by what it counts there: its weight in the sum, or what a loss of
log-probabilities makes of it. The head gets no gradient: it is frozen. (The idea is that of
Liger's fused linear cross-entropy and of Apple's cut cross-entropy, arXiv 2411.09009, without their
gradient for the head.)

Legend: N tokens, V vocabulary, C width of the hidden states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels import products

CHUNK_BYTES = 24 * 2**20
"""What a chunk of fp32 logits may take: small enough that its memory is reused, not mapped anew each time."""
CUDA_CHUNK_BYTES = 256 * 2**20
"""On CUDA: some five hundred tokens of a large vocabulary, so that a product takes longer than reading the head."""


class Form(NamedTuple):
    """ε, ζ and c of the loss of a token."""

    smoothing: float = 0.0
    z_loss: float = 0.0
    cap: float | None = None


PLAIN = Form()


class TokenLoss(NamedTuple):
    """``loss`` is the weighted sum, a scalar, and ``each`` what it sums, per token, both with a gradient; per token,
    without one, ``nll``, which is −log p whatever the form, and whether the target is the ``best`` guess."""

    loss: Tensor
    nll: Tensor
    best: Tensor
    each: Tensor


def weighted_cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, form: Form = PLAIN
) -> TokenLoss:
    """The plain form, computed in fp32, or in fp64 where the logits are."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if form.cap is not None:
        z_NV = torch.tanh(z_NV / form.cap) * form.cap
    nll_N = each_N = F.cross_entropy(z_NV, targets_N, reduction="none")
    if form.smoothing:
        each_N = F.cross_entropy(z_NV, targets_N, reduction="none", label_smoothing=form.smoothing)
    if form.z_loss:
        each_N = each_N + form.z_loss * z_NV.logsumexp(-1).square()
    loss = (each_N * weights_N.to(each_N.dtype)).sum()
    best_N = logits_NV.detach().argmax(dim=-1) == targets_N
    return TokenLoss(loss, nll_N.detach(), best_N, each_N)


def linear_cross_entropy(
    hidden_NC: Tensor,
    head_VC: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    bias_V: Tensor | None = None,
    form: Form = PLAIN,
    *,
    chunk: int | None = None,
) -> TokenLoss:
    """`weighted_cross_entropy` of the logits ``hidden @ head.T + bias``, which never exist as a whole.

    ``head`` and ``bias`` are frozen and get no gradient; ``chunk`` is how many tokens' logits exist at
    a time (default: what 24 MiB of fp32 hold, 256 on CUDA).
    """
    most = CUDA_CHUNK_BYTES if hidden_NC.is_cuda else CHUNK_BYTES
    rows = chunk or max(most // (4 * head_VC.shape[0]), 1)
    each_N, nll_N, best_N = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NC, head_VC.detach(), targets_N, bias_V, form, rows
    )
    loss = (each_N * weights_N.to(each_N.dtype)).sum()
    return TokenLoss(loss, nll_N, best_N, each_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        head_VC: Tensor,
        targets_N: Tensor,
        bias_V: Tensor | None,
        form: Form,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        each_N = torch.empty(len(hidden_NC), dtype=wide, device=hidden_NC.device)
        nll_N = torch.empty_like(each_N)
        best_N = torch.empty(len(hidden_NC), dtype=torch.bool, device=hidden_NC.device)
        needed = ctx.needs_input_grad[0]
        widens = products.widens(hidden_NC)
        grad_NC = torch.empty_like(hidden_NC) if needed else None
        for start in range(0, len(hidden_NC), rows):
            part = slice(start, start + rows)
            given = hidden_NC[part].float() if widens else hidden_NC[part]
            logits = (products.wide_linear if widens else F.linear)(given, head_VC, bias_V)
            found = _token_loss(logits, targets_N[part], wide, form, slope=needed)
            each_N[part], nll_N[part], best_N[part], slope = found
            if grad_NC is None:
                continue
            if widens:
                grad_NC[part] = products.wide_times(slope, head_VC)
            else:
                grad_NC[part] = slope.to(head_VC.dtype) @ head_VC
        ctx.save_for_backward(*(() if grad_NC is None else (grad_NC,)))
        ctx.mark_non_differentiable(nll_N, best_N)
        return each_N, nll_N, best_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NC,) = ctx.saved_tensors
        return (grad_NC * outer[0][:, None]).to(grad_NC.dtype), None, None, None, None, None


def _token_loss(
    logits: Tensor, targets: Tensor, wide: torch.dtype, form: Form, *, slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, nll, hits, and (if asked) the loss's slope in the logits, from one softmax:
    logsumexp(z) = max z − log max softmax(z). Logits are used up."""
    steep = None
    if form.cap is not None:
        share = torch.tanh(logits.to(wide) / form.cap)
        steep = 1 - share.square() if slope else None
        logits = share.mul_(form.cap)
    top = logits.max(dim=-1, keepdim=True)
    chosen = logits.gather(1, targets[:, None]).to(wide)
    mean = logits.mean(-1, keepdim=True, dtype=wide) if form.smoothing else None
    if logits.dtype == wide:
        found = torch.softmax(logits, dim=-1, out=logits)
    else:
        found = torch.softmax(logits, dim=-1, dtype=wide)
    log_sum = top.values.to(wide) - found.gather(1, top.indices).log()
    nll = each = log_sum - chosen
    if mean is not None:
        each = log_sum - (1 - form.smoothing) * chosen - form.smoothing * mean
    if form.z_loss:
        each = each + form.z_loss * log_sum.square()
    if slope:
        if form.z_loss:
            found.mul_(1 + 2 * form.z_loss * log_sum)
        # Taken off before rounding to the head's dtype: where the model is sure, the difference is far smaller than
        # either term.
        found[torch.arange(len(found), device=found.device), targets] -= 1 - form.smoothing
        if form.smoothing:
            found.sub_(form.smoothing / found.shape[1])
        if steep is not None:
            found.mul_(steep)
    return each[:, 0], nll[:, 0], top.indices[:, 0] == targets, found
