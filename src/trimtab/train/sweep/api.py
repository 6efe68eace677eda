"""Sweeps from Python."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trimtab.train.screen import Screen
from trimtab.train.sweep.record import Asked
from trimtab.train.sweep.sweep import Sweep, SweepOutcome


def sweep_recipe(
    asked: Asked, *, out: str | Path | None = None, resume: bool = False, quiet: bool = False
) -> SweepOutcome:
    """Load the base once, train the variants on it together, and keep the best.

    Raises:
        TrimtabError: see `Sweep`.
    """
    screen = Screen(Console(quiet=quiet, highlight=False))
    return Sweep(asked, screen, out=None if out is None else str(out), resume=resume).go()
