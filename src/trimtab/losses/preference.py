"""Preferences between two answers: DPO (Rafailov et al., arXiv 2305.18290).

    reward_d = β · Σ w (log p − log p_ref),   h = reward_chosen − reward_rejected
    loss = −(1 − ε) log σ(h) − ε log σ(−h)     ε: how often a preference is taken to be the wrong way round

Data come in pairs, the chosen answer first. Each half of a pair has half of its loss, and counts one half where a step
divides by what its data count. Metrics of a datum: its ``reward``, and of its pair the ``margin`` h and whether h > 0
(``accuracy``).
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from trimtab.losses.loss import Loss, Reference, Terms, Tokens


@final
class DPO(Loss):
    """Of pairs of data, the chosen answer before the rejected one. The reference is computed without gradients from the
    same weights; data that have ``logprobs`` bring it with them."""

    uses: ClassVar[tuple[str, ...]] = ("logprobs",)

    beta: float = Field(default=0.1, gt=0)
    """How much a log-probability counts: small lets the policy stray further from the reference."""
    reference: str | None = None
    """The adapter that is the reference; None is the bare base."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """How often preferences are taken to be the wrong way round."""

    @property
    def together(self) -> int:
        return 2

    @property
    def compared(self) -> Reference | None:
        return Reference(self.reference)

    def counts(self, weight: float) -> float:
        return 0.5

    def terms(self, tokens: Tokens) -> Terms:
        rewards_D = self.beta * tokens.sums(tokens.logp_K - tokens.logprobs_K)
        margins_P = rewards_D[0::2] - rewards_D[1::2]
        losses_P = -F.logsigmoid(margins_P)
        if self.label_smoothing:
            losses_P = torch.lerp(losses_P, -F.logsigmoid(-margins_P), self.label_smoothing)
        margins_D = margins_P.detach().repeat_interleave(2)
        metrics = {
            "reward": rewards_D.detach(),
            "margin": margins_D,
            "accuracy": (margins_D > 0).to(margins_D.dtype),
        }
        return Terms(losses_P.repeat_interleave(2) / 2, metrics)
