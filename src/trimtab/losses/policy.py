"""Losses of a policy that is learnt from its own answers, which an older copy of it gave.

    r_n = exp(log p_n − log q_n),   log q_n what the token had when it was drawn, A_n its advantage

    importance sampling   −Σ w · r A
    PPO                   −Σ w · min(r A, clip(r) A)            (Schulman et al., arXiv 1707.06347)
    CISPO                 −Σ w · stop_gradient(clip(r)) A log p (MiniMax-M1, arXiv 2506.13585)

Names, sums and defaults are those of Tinker's losses. Metrics of a datum: the mean ``ratio``, ``clipped``, the share of
its tokens where the bounds changed something, and ``kl``, the mean of log q − log p.

Legend: K tokens with a weight.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.losses.loss import Loss, Terms, Tokens


class PolicyLoss(Loss):
    """What the three share. Abstract."""

    uses: ClassVar[tuple[str, ...]] = ("logprobs", "advantages")
    needs: ClassVar[tuple[str, ...]] = uses

    def terms(self, tokens: Tokens) -> Terms:
        ratio_K = (tokens.logp_K - tokens.logprobs_K).exp()
        gain_K, clipped_K = self.gain(ratio_K, tokens)
        metrics = {
            "ratio": tokens.means(ratio_K),
            "clipped": tokens.means(clipped_K.to(ratio_K.dtype)),
            "kl": tokens.means(tokens.logprobs_K - tokens.logp_K),
        }
        return Terms(-tokens.sums(gain_K), metrics)

    @abstractmethod
    def gain(self, ratio_K: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What each token adds, and whether a bound changed it."""


@final
class ImportanceSampling(PolicyLoss):
    """−Σ w · r A."""

    def gain(self, ratio_K: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return ratio_K * tokens.advantages_K, torch.zeros_like(ratio_K, dtype=torch.bool)


class _Bounded(PolicyLoss):
    """With bounds on the ratio. Abstract."""

    clip_low_threshold: float
    clip_high_threshold: float

    @model_validator(mode="after")
    def _in_order(self) -> _Bounded:
        if not 0 <= self.clip_low_threshold <= self.clip_high_threshold:
            raise ValueError("0 <= clip_low_threshold <= clip_high_threshold must hold")
        return self

    def bounded(self, ratio_K: Tensor) -> Tensor:
        return ratio_K.clamp(self.clip_low_threshold, self.clip_high_threshold)


@final
class PPO(_Bounded):
    """−Σ w · min(r A, clip(r) A)."""

    clip_low_threshold: float = Field(default=0.8)
    """Least ratio that counts."""
    clip_high_threshold: float = Field(default=1.2)
    """Greatest ratio that counts."""

    def gain(self, ratio_K: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        plain_K = ratio_K * tokens.advantages_K
        clipped_K = self.bounded(ratio_K) * tokens.advantages_K
        return plain_K.minimum(clipped_K), clipped_K < plain_K


@final
class CISPO(_Bounded):
    """−Σ w · stop_gradient(clip(r)) A log p."""

    clip_low_threshold: float = Field(default=0.0)
    """Least ratio."""
    clip_high_threshold: float = Field(default=4.0)
    """Greatest ratio."""

    def gain(self, ratio_K: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        fixed_K = ratio_K.detach()
        bounded_K = self.bounded(fixed_K)
        return bounded_K * tokens.advantages_K * tokens.logp_K, bounded_K != fixed_K
