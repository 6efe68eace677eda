"""Optimisation of one adapter: parameters of a step, schedules, groups, AdamW.

The names below need no torch, so that a recipe can be checked without it; `trimtab.optim.adam` does.
"""

from trimtab.optim.params import AdamParams
from trimtab.optim.schedule import ScheduleName, learning_rate

__all__ = ["AdamParams", "ScheduleName", "learning_rate"]
