"""Measurements on held-out data: loss and token accuracy, and answers compared with references."""

from trimtab.evals.answers import Accuracy, Answered, Question, answer, questions, score, some
from trimtab.evals.evaluate import Evaluation, evaluate, merged
from trimtab.evals.forgetting import Forgetting, forgetting, general_text, paragraphs
from trimtab.evals.held_out import HeldOut, held_out
from trimtab.evals.intervals import Interval, bootstrap, mean, ratio, wilson
from trimtab.evals.metrics import Metric, Scores, check_metrics, compare, metrics, values_of
from trimtab.evals.tasks import evaluate_tasks

__all__ = [
    "Accuracy",
    "Answered",
    "Evaluation",
    "Forgetting",
    "HeldOut",
    "Interval",
    "Metric",
    "Question",
    "Scores",
    "answer",
    "bootstrap",
    "check_metrics",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "forgetting",
    "general_text",
    "held_out",
    "mean",
    "merged",
    "metrics",
    "paragraphs",
    "questions",
    "ratio",
    "score",
    "some",
    "values_of",
    "wilson",
]
