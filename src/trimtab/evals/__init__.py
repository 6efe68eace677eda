"""Measurements on held-out data: loss and token accuracy, and answers compared with references."""

from trimtab.evals.answers import Accuracy, Answered, Question, answer, questions, score
from trimtab.evals.forgetting import Forgetting, forgetting, general_text, paragraphs
from trimtab.evals.held_out import HeldOut, held_out
from trimtab.evals.intervals import Interval, ratio, wilson

__all__ = [
    "Accuracy",
    "Answered",
    "Forgetting",
    "HeldOut",
    "Interval",
    "Question",
    "answer",
    "forgetting",
    "general_text",
    "held_out",
    "paragraphs",
    "questions",
    "ratio",
    "score",
    "wilson",
]
