"""Weights & Biases: a run of the project ``trimtab``, or of the one that ``WANDB_PROJECT`` names.

Online, offline (``WANDB_MODE=offline``; ``wandb sync`` sends it later) or not at all is its own setting.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, final

from trimtab.train.trackers.tracker import PROJECT, Started, Status, Tracked, Tracker, package

CODES: Mapping[Status, int] = {"finished": 0, "interrupted": 130, "failed": 1}


@final
class WandB(Tracker):
    """W&B takes no step twice, so a run that goes on from an earlier step logs from where it was before."""

    kind: ClassVar[str] = "wandb"

    def __init__(self) -> None:
        self._module = package("wandb", self.kind)
        self._run: Any = None

    def start(self, run: Tracked) -> Started:
        self._run = self._module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id or uuid.uuid4().hex[:12],
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
            settings=self._module.Settings(console="off", silent=True),
        )
        return Started(str(self._run.id), {} if run.id is None else run.noted)

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=CODES[status])
