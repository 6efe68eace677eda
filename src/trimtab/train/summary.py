"""What a run's folder says of the run: its events put in order, and the numbers that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import FileFormatError
from trimtab.evals.forgetting import Forgetting
from trimtab.evals.intervals import Interval, ratio
from trimtab.train.events import Event, read_events
from trimtab.train.measure import JUDGES, Measured

Points = list[tuple[float, float]]
ENDING = 10
"""The training loss at the end is the mean over the last tenth of the steps."""


@dataclass(frozen=True)
class Metric:
    """One number before and after; ``unit`` says of what, where it is known."""

    name: str
    unit: str
    before: Interval | None
    after: Interval | None

    @property
    def apart(self) -> bool:
        """Whether both are known and their intervals do not touch."""
        return self.before is not None and self.after is not None and self.before.apart(self.after)


@dataclass(frozen=True)
class RunSummary:
    """One run, finished or not. Events that a resume undid are left out."""

    folder: Path
    recipe: dict[str, Any]
    start: Event
    steps: Sequence[Event]
    evals: Sequence[Event]
    unrelated: Sequence[Event]
    end: Event | None
    profile: Event | None = None

    @classmethod
    def read(cls, folder: Path) -> RunSummary:
        """Read a run's folder.

        Raises:
            FileFormatError: it holds no run that has started.
        """
        events = read_events(folder / "events.jsonl")
        kinds: dict[str, list[Event]] = {}
        for event in events:
            kinds.setdefault(str(event.get("event")), []).append(event)
        if "start" not in kinds:
            raise FileFormatError(
                f"{folder} holds no run that has started (no 'start' in its events.jsonl)."
                if folder.is_dir()
                else f"there is no folder {folder}; name the folder of a run."
            )
        try:
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise FileFormatError(f"{folder}: cannot read recipe.yaml: {error}.") from error
        return cls(
            folder,
            recipe,
            kinds["start"][-1],
            kinds.get("step", []),
            kinds.get("eval", []),
            kinds.get("forgetting", []),
            kinds.get("end", [None])[-1],
            kinds.get("profile", [None])[-1],
        )

    # -- how far it came -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last(self) -> int:
        """The last step."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def seconds(self) -> float:
        return float(sum(event["seconds"] for event in self.steps))

    @property
    def tokens(self) -> int:
        return int(self.steps[-1]["tokens"]) if self.steps else 0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def peak(self) -> int:
        """Bytes; 0 where it is not known."""
        return int((self.end or {}).get("peak_bytes") or 0)

    # -- held-out data -------------------------------------------------------------------------------

    @cached_property
    def before(self) -> Event | None:
        """The bare base."""
        return next((event for event in self.evals if event["of"] == "base"), None)

    @cached_property
    def measured(self) -> list[Event]:
        """The adapter, each time."""
        return [event for event in self.evals if event["of"] == "adapter"]

    @property
    def after(self) -> Event | None:
        """The adapter at the end of a finished run."""
        return self.measured[-1] if self.measured and self.end is not None else None

    @cached_property
    def best(self) -> Event | None:
        """Where the adapter's held-out loss was lowest."""
        return min(self.measured, key=lambda event: event["loss"]["value"], default=None)

    @cached_property
    def metrics(self) -> list[Metric]:
        """Every metric that was measured, task metrics first."""
        old, new = _metrics(self.before), _metrics(self.after)
        names = list(dict.fromkeys([*old, *new]))
        last = [name for name in ("held-out loss", ACCURACY) if name in names]
        shown = {ACCURACY: f"{self.unit} accuracy"}
        return [
            Metric(
                shown.get(name, name),
                UNITS.get(name, "").format(unit=self.unit),
                old.get(name),
                new.get(name),
            )
            for name in [*(n for n in names if n not in last), *last]
        ]

    @property
    def unit(self) -> str:
        """What is right or wrong: a token, or a text that is classified."""
        return "text" if self.recipe.get("task") == "sequence-classification" else "token"

    @cached_property
    def change(self) -> Interval | None:
        """By how much the held-out loss changed, example by example."""
        if self.before is None or self.after is None:
            return None
        return Measured.of(self.after).held_out.change(Measured.of(self.before).held_out)

    # -- curves --------------------------------------------------------------------------------------

    def curve(self, field: str) -> Points:
        """A number of the steps that is finite, by step."""
        return [
            (float(event["step"]), float(event[field]))
            for event in self.steps
            if isinstance(event.get(field), int | float)
        ]

    @property
    def held_out_curve(self) -> Points:
        """The base at step 0, then the adapter."""
        first = [] if self.before is None else [(0.0, float(self.before["loss"]["value"]))]
        return first + [(float(e["step"]), float(e["loss"]["value"])) for e in self.measured]

    @property
    def speed_curve(self) -> Points:
        """Tokens a second, by step."""
        found, seen = [], 0
        for event in self.steps:
            if event["seconds"]:
                found.append((float(event["step"]), (event["tokens"] - seen) / event["seconds"]))
            seen = event["tokens"]
        return found

    # -- training against held-out data --------------------------------------------------------------

    def training_loss(self, until: int | None = None) -> Interval | None:
        """Of the last tenth of the steps (up to step ``until``), with an interval over steps."""
        steps = [
            event
            for event in self.steps
            if isinstance(event["loss"], int | float) and event["step"] <= (until or self.last)
        ]
        if not steps:
            return None
        count = min(len(steps), max(ENDING // 2, -(-len(self.steps) // ENDING)))
        weights = [float(event.get("weight") or 1.0) for event in steps[-count:]]
        losses = [float(event["loss"]) for event in steps[-count:]]
        return ratio([a * b for a, b in zip(losses, weights, strict=True)], weights)

    @property
    def gap(self) -> float | None:
        """Held-out loss above training loss at the end, in nats per token or text."""
        train = self.training_loss()
        if train is None or self.after is None:
            return None
        return float(self.after["loss"]["value"]) - train.value

    # -- forgetting ----------------------------------------------------------------------------------

    def forgetting(self, of: str) -> Forgetting | None:
        """The unrelated text, of the ``base`` or the ``adapter``."""
        events = [event for event in self.unrelated if event["of"] == of]
        return Forgetting.of(events[-1]) if events else None

    @property
    def forgotten(self) -> Interval | None:
        """Nats per token by which the unrelated text became harder to predict."""
        before, after = self.forgetting("base"), self.forgetting("adapter")
        if before is None or after is None or before.weights != after.weights:
            return None
        return after.change(before)


ACCURACY = "token accuracy"
UNITS = {
    "answers right": "share of examples",
    "held-out loss": "nats per {unit}",
    ACCURACY: "share of {unit}s",
}


def _metrics(event: Event | None) -> dict[str, Interval]:
    """The intervals in one eval event, by the names that people read."""
    if event is None:
        return {}
    found = {}
    if event.get("answers"):
        found["answers right"] = Interval(**event["answers"]["interval"])
    others = event.get("metrics") or {}
    judge = next((name for name in JUDGES if name in others), None)  # what "answers right" is
    for name, interval in others.items():
        if name != judge:
            found[name] = Interval(**interval)
    found["held-out loss"] = Interval(**event["loss"])
    found[ACCURACY] = Interval(**event["accuracy"])
    return found
