"""TensorBoard: event files in the run's folder, ``tensorboard --logdir runs`` shows all runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import yaml

from trimtab.train.trackers.tracker import Started, Status, Tracked, Tracker, package

FOLDER = "tensorboard"


@final
class TensorBoard(Tracker):
    """A resumed run declares all earlier points of its folder void and writes them again: none is there twice."""

    kind: ClassVar[str] = "tensorboard"
    several: ClassVar[bool] = True

    def __init__(self) -> None:
        package("tensorboard", self.kind)
        self._module = package("torch.utils.tensorboard", self.kind)
        self._writer: Any = None

    def start(self, run: Tracked) -> Started:
        purge = None if run.id is None else 0
        self._writer = self._module.SummaryWriter(str(run.folder / FOLDER), purge_step=purge)
        text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        self._writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()), 0)
        return Started(FOLDER)

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step, walltime=time)
        self._writer.flush()

    def finish(self, status: Status) -> None:
        self._writer.close()
