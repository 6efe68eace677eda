"""A run: one adapter's course, driven from its beginning to its end, and everything that it leaves on disk.

    recipe.yaml    the recipe, resolved
    events.jsonl   what happened, appended to
    checkpoints/   whole states to resume from
    adapter/       the result
    report.html    the result, explained

Up to rounding that depends on the machine, a run is a function of its recipe, data and base; on a CPU a
resumed run ends bitwise where an uninterrupted one does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimtab.adapt.adapter import Adapter
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import NonFiniteLossError, StorageError, TrimtabError
from trimtab.models.load import Base
from trimtab.train.course import Course
from trimtab.train.ending import finish
from trimtab.train.frozen import kept_below
from trimtab.train.interrupt import Interrupt
from trimtab.train.measure import Measured
from trimtab.train.profiler import Profiler
from trimtab.train.progress import Progress
from trimtab.train.recipe import Recipe
from trimtab.train.report import write_report
from trimtab.train.screen import Screen
from trimtab.train.setup import resolved, run_folder
from trimtab.train.sources import Sources, read_sources
from trimtab.train.stage import Computed, Stage
from trimtab.train.trackers import Trackers


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``before`` is the bare base and ``after`` the adapter, on the held-out data."""

    folder: Path
    status: Literal["finished", "interrupted"]
    steps: int
    before: Measured | None
    after: Measured | None


class Run:
    """One execution of a recipe with an attached adapter. Call `go` once.

    Args:
        recipe: as the user gave it; `Run.recipe` is resolved.
        resume: go on from the last checkpoint in the recipe's folder.
        data, held_out: Python objects with rows, in the place of the recipe's paths.
        profile: watch a few of the steps, and say where time and memory go.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        adapter: Adapter,
        screen: Screen,
        *,
        resume: bool,
        data: object = None,
        held_out: object = None,
        profile: bool = False,
    ) -> None:
        trackers = Trackers(recipe.track)
        self.base, self.adapter, self.screen = base, adapter, screen
        self.folder = run_folder(recipe, adapter, resume=resume)
        self.engine = Engine(base, micro_tokens=recipe.batch.micro_tokens, memory=recipe.memory)
        screen.unit = "text" if self.engine.labels else "token"
        self.recipe = resolved(recipe, base, adapter, self.folder)
        began = time.perf_counter()
        with screen.reading() as progress:
            self.sources: Sources = read_sources(
                self.recipe,
                base.tokenizer,
                self.engine.context(adapter.name),
                data=data,
                held_out=held_out,
                progress=progress,
            )
        self.profiler = self._profiler(time.perf_counter() - began) if profile else None
        stage = Stage(base, self.engine, screen, screen.note)
        self.course = Course(self.recipe, stage, adapter, self.sources, trackers, self.profiler)
        self.engine.frozen, self.kept = kept_below(
            self.recipe,
            self.engine,
            adapter,
            self.sources,
            self.course.unrelated.data,
            total=self.course.total,
            note=lambda text: screen.note(text, "yellow"),
        )
        self.course.open(resume=resume)

    @property
    def progress(self) -> Progress:
        """Where it stands."""
        return self.course.progress

    def go(self) -> Outcome:
        """Train to the end, or until someone asks to stop.

        Raises:
            NonFiniteLossError: the loss is not finite; the last checkpoint is kept and named.
            StorageError: the disk is full; everything saved before is intact.
        """
        course = self.course
        try:
            course.plan(self.kept)
            course.before()
            stopped = self._train()
            profile = None if self.profiler is None else self.profiler.profile()
            after = None if stopped else finish(course)
        except BaseException as error:
            course.failed(error)
            if isinstance(error, NonFiniteLossError | StorageError):
                raise self._located(error) from error
            raise
        finally:
            if self.profiler is not None:
                self.profiler.close()
            if self.engine.frozen is not None:
                self.engine.frozen.close()
            course.close()
        write_report(self.folder)
        if self.profiler is not None:
            self.screen.profile(profile)
        status: Literal["finished", "interrupted"] = "interrupted" if stopped else "finished"
        return Outcome(self.folder, status, self.progress.step, course.bare, after)

    def _train(self) -> bool:
        """All steps that are left; whether someone asked to stop before the last."""
        with Interrupt() as interrupt, self.screen.progress(self.progress.step, self.course.total):
            steps = self.course.steps(lambda: interrupt.wanted)
            try:
                members = next(steps)
                while True:
                    members = steps.send(self._computed(members))
            except StopIteration as ended:
                return bool(ended.value)

    def _computed(self, members: list[Datum]) -> Computed:
        """The losses of a step's examples, whose gradients the adapter then holds."""
        began = time.perf_counter()
        least = self.recipe.batch.micro_tokens
        self.engine.micro_tokens = max(least, *map(len, members))
        loss = self.engine.forward_backward(members, self.adapter.name, self.recipe.loss)
        return Computed(loss, time.perf_counter() - began)

    def _profiler(self, reading: float) -> Profiler:
        """What watches the steps; ``reading`` are the seconds that the data took."""
        return Profiler(
            self.base,
            self.engine,
            self.adapter,
            reading=reading,
            note=lambda found: self.course.events.add("profile", found.fields()),
        )

    def _located(self, error: NonFiniteLossError | StorageError) -> TrimtabError:
        """The error with what is saved and how to go on."""
        checkpoints = self.course.checkpoints
        last = checkpoints.last()
        kept = (
            f"The last checkpoint is {checkpoints.path(last)}."
            if last
            else "There is no checkpoint yet."
        )
        advice = (
            " Lower the learning rate, or mend those examples."
            if isinstance(error, NonFiniteLossError)
            else ""
        )
        return type(error)(f"step {self.progress.step + 1}: {error} {kept}{advice}")
