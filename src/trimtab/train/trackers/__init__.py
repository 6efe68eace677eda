"""Experiment trackers: what goes to ``events.jsonl`` is also sent to TensorBoard, MLflow, W&B or Trackio."""

from trimtab.train.trackers.follow import Trackers, trackers
from trimtab.train.trackers.metrics import Metrics
from trimtab.train.trackers.tracker import Started, Tracked, Tracker

__all__ = ["Metrics", "Started", "Tracked", "Tracker", "Trackers", "trackers"]
