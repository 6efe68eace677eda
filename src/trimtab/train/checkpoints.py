"""Checkpoints of a run: ``checkpoints/step-000120``, each whole or absent; the last few stay, and the best."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d{6,})")


class Checkpoints:
    """The checkpoints below one folder.

    Args:
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def last(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(self.steps(), default=None)

    def forget_after(self, step: int) -> None:
        """Remove those of later steps."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later), ignore_errors=True)

    def prune(self, best: int | None) -> None:
        """Remove all but the last ``keep`` and the best; and what a killed process left half-written."""
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)
        self.sweep()

    def sweep(self) -> None:
        """Remove temporary folders. One process at a time runs in a run's folder."""
        if self.folder.is_dir():
            for entry in self.folder.glob(".step-*"):
                shutil.rmtree(entry, ignore_errors=True)
