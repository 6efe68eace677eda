"""Cross-entropy as a sum over weighted tokens; nothing is averaged here.

    loss = Σ_n w_n · (logsumexp(z_n) − z_n[t_n])

`weighted_cross_entropy` is the plain form. `linear_cross_entropy` takes the hidden states before a
frozen output head and never holds all logits: it goes by chunks of tokens and forms the gradient of
the hidden states in the forward pass, where the chunk's probabilities are at hand,

    ∂loss/∂h_n = w_n · (softmax(z_n) − onehot(t_n)) W,

so that backward is one multiplication. The head gets no gradient: it is frozen. (The idea is that of
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


class TokenLoss(NamedTuple):
    """``loss`` is the weighted sum, a scalar with a gradient; per token, without one, ``nll`` and whether
    the target is the ``best`` guess."""

    loss: Tensor
    nll: Tensor
    best: Tensor


def weighted_cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> TokenLoss:
    """The plain form, computed in fp32, or in fp64 where the logits are."""
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    nll_N = F.cross_entropy(wide, targets_N, reduction="none")
    loss = (nll_N * weights_N.to(nll_N.dtype)).sum()
    return TokenLoss(loss, nll_N.detach(), logits_NV.detach().argmax(dim=-1) == targets_N)


def linear_cross_entropy(
    hidden_NC: Tensor,
    head_VC: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> TokenLoss:
    """`weighted_cross_entropy` of the logits ``hidden @ head.T + bias``, which never exist as a whole.

    ``head`` and ``bias`` are frozen and get no gradient; ``chunk`` is how many tokens' logits exist at
    a time (default: what 24 MiB of fp32 hold, 256 on CUDA).
    """
    most = CUDA_CHUNK_BYTES if hidden_NC.is_cuda else CHUNK_BYTES
    rows = chunk or max(most // (4 * head_VC.shape[0]), 1)
    return TokenLoss(
        *_LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_NC, head_VC.detach(), targets_N, weights_N, bias_V, rows
        )
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        head_VC: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        bias_V: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        nll_N = torch.empty(len(hidden_NC), dtype=wide, device=hidden_NC.device)
        best_N = torch.empty(len(hidden_NC), dtype=torch.bool, device=hidden_NC.device)
        needed = ctx.needs_input_grad[0]
        widens = products.widens(hidden_NC)
        grad_NC = torch.empty_like(hidden_NC) if needed else None
        for start in range(0, len(hidden_NC), rows):
            part = slice(start, start + rows)
            given = hidden_NC[part].float() if widens else hidden_NC[part]
            logits = (products.wide_linear if widens else F.linear)(given, head_VC, bias_V)
            nll_N[part], best_N[part], probabilities = _nll(logits, targets_N[part], wide)
            if grad_NC is not None:
                # One is taken off before rounding to the head's dtype: where the model is sure, the
                # difference is far smaller than either term.
                probabilities[torch.arange(len(logits), device=logits.device), targets_N[part]] -= 1
                if widens:
                    grad = products.wide_times(probabilities, head_VC)
                else:
                    grad = probabilities.to(head_VC.dtype) @ head_VC
                grad_NC[part] = grad * weights_N[part, None].to(grad.dtype)
        ctx.save_for_backward(*(() if grad_NC is None else (grad_NC,)))
        ctx.mark_non_differentiable(nll_N, best_N)
        return (nll_N * weights_N.to(wide)).sum(), nll_N, best_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NC,) = ctx.saved_tensors
        return grad_NC * outer[0].to(grad_NC.dtype), None, None, None, None, None


def _nll(logits: Tensor, targets: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """nll, hits and probabilities from one softmax: logsumexp(z) = max z − log max softmax(z). Logits are used up."""
    top = logits.max(dim=-1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])
    if logits.dtype == wide:
        probabilities = torch.softmax(logits, dim=-1, out=logits)
    else:
        probabilities = torch.softmax(logits, dim=-1, dtype=wide)
    largest = probabilities.gather(1, top.indices)
    nll = (top.values.to(wide) - chosen.to(wide) - largest.log())[:, 0]
    return nll, top.indices[:, 0] == targets, probabilities
