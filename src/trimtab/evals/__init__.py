"""Measurements on held-out data: loss and token accuracy, and answers compared with references."""

from trimtab.evals.answers import Accuracy, Answered, Question, answer, questions, score
from trimtab.evals.held_out import HeldOut, held_out
from trimtab.evals.intervals import Interval, ratio, wilson

__all__ = [
    "Accuracy",
    "Answered",
    "HeldOut",
    "Interval",
    "Question",
    "answer",
    "held_out",
    "questions",
    "ratio",
    "score",
    "wilson",
]
