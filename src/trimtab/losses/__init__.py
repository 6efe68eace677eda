"""Losses: functions from what the model says to a weighted sum over tokens."""

from trimtab.losses.cross_entropy import (
    Form,
    TokenLoss,
    linear_cross_entropy,
    weighted_cross_entropy,
)
from trimtab.losses.loss import Custom, Document, Likelihood, Loss
from trimtab.losses.policy import CISPO, PPO, ImportanceSampling
from trimtab.losses.preference import DPO
from trimtab.losses.promised import promised_logits

__all__ = [
    "CISPO",
    "DPO",
    "PPO",
    "Custom",
    "Document",
    "Form",
    "ImportanceSampling",
    "Likelihood",
    "Loss",
    "TokenLoss",
    "linear_cross_entropy",
    "promised_logits",
    "weighted_cross_entropy",
]
