"""Losses: functions from what the model says to a weighted sum over tokens."""

from trimtab.losses.cross_entropy import (
    Form,
    TokenLoss,
    linear_cross_entropy,
    weighted_cross_entropy,
)
from trimtab.losses.promised import promised_logits

__all__ = ["Form", "TokenLoss", "linear_cross_entropy", "promised_logits", "weighted_cross_entropy"]
