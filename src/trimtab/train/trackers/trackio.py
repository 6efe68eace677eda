"""Trackio: a run of the project ``trimtab``, or of the one that ``TRACKIO_PROJECT`` names.

Kept on this machine, or in a Space of the hub: its own settings (``TRACKIO_DIR``, ``TRACKIO_SPACE_ID``).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, ClassVar, final

from trimtab.train.trackers.tracker import PROJECT, Started, Status, Tracked, Tracker, package


@final
class Trackio(Tracker):
    """Trackio finds a run by its name, so the name is made to be the only one of its kind."""

    kind: ClassVar[str] = "trackio"

    def __init__(self) -> None:
        self._module = package("trackio", self.kind)
        self._run: Any = None

    def start(self, run: Tracked) -> Started:
        name = run.id or f"{run.name}-{uuid.uuid4().hex[:8]}"
        with redirect_stdout(StringIO()):  # it greets, and explains its dashboard
            self._run = self._module.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=name,
                resume="allow",
                config=dict(run.config),
                embed=False,
            )
        return Started(name, {} if run.id is None else run.noted)

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, status: Status) -> None:
        with redirect_stdout(StringIO()):
            self._module.finish()  # the run's own leaves work for the end of the process
