"""MLflow: a run of the experiment ``trimtab``, or of the one that ``MLFLOW_EXPERIMENT_NAME`` names.

Where it is kept is MLflow's own setting (``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, final

from trimtab.train.trackers.tracker import (
    PROJECT,
    Started,
    Status,
    Tracked,
    Tracker,
    flat,
    package,
)

STATUS: Mapping[Status, str] = {
    "finished": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
AT_ONCE = 100  # options in one request
LONGEST = 500  # characters of an option that every release of MLflow takes


@final
class MLflow(Tracker):
    """What MLflow has of a run is asked of MLflow when the run goes on."""

    kind: ClassVar[str] = "mlflow"
    several: ClassVar[bool] = True

    def __init__(self) -> None:
        self._entities = package("mlflow.entities", self.kind)
        self._tracking = package("mlflow.tracking", self.kind)
        self._client: Any = None
        self._id = ""

    def start(self, run: Tracked) -> Started:
        client = self._client = self._tracking.MlflowClient()
        if run.id is not None:
            self._id = run.id
            client.update_run(run.id, status="RUNNING")
            names = client.get_run(run.id).data.metrics
            return Started(
                run.id,
                {n: max(m.step for m in client.get_metric_history(run.id, n)) for n in names},
            )
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        self._id = client.create_run(experiment, run_name=run.name).info.run_id
        options = [
            self._entities.Param(key, str(value)[:LONGEST])
            for key, value in flat(run.config).items()
        ]
        for first in range(0, len(options), AT_ONCE):
            client.log_batch(self._id, params=options[first : first + AT_ONCE])
        return Started(self._id)

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        stamp = round(time * 1000)
        points = [self._entities.Metric(name, v, stamp, step) for name, v in metrics.items()]
        self._client.log_batch(self._id, metrics=points)

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._id, STATUS[status])
