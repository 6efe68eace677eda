"""Optimisation of one adapter: parameters of a step, what it learns, schedules, groups, AdamW.

The names below need no torch, so that a recipe can be checked without it; `trimtab.optim.adam` does.
"""

from trimtab.optim.params import AdamParams, CrossEntropy
from trimtab.optim.schedule import ScheduleName, learning_rate

__all__ = ["AdamParams", "CrossEntropy", "ScheduleName", "learning_rate"]
