"""One adapter's way through its recipe: all of a run but the computation of a step's losses and gradients.

Whoever drives a course asks it for the examples of its next step, computes them, and tells it what they gave:

    steps = course.steps(asked)
    members = next(steps)
    members = steps.send(Computed(loss, seconds))    # and so on, until StopIteration

A run drives one course, a sweep several of them in one forward and backward; schedule, measurements, checkpoints,
events, early stopping and resumption are the same lines for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch

from trimtab.adapt.adapter import Adapter
from trimtab.data import Cursor, Datum, preview
from trimtab.data.feed import Step
from trimtab.engine import StepResult
from trimtab.errors import DataError, StorageError
from trimtab.train import facts
from trimtab.train.checkpoints import Checkpoints
from trimtab.train.events import Events, read_events
from trimtab.train.measure import Measure, Measured
from trimtab.train.profiler import Profiler
from trimtab.train.progress import Progress
from trimtab.train.recipe import Recipe
from trimtab.train.recipe_file import write_recipe
from trimtab.train.setup import (
    Rows,
    check_same,
    check_sites,
    plan_rows,
    saves_every,
    start_facts,
    total_steps,
)
from trimtab.train.sources import Sources
from trimtab.train.stage import Computed, Stage
from trimtab.train.trackers import Trackers
from trimtab.train.unrelated import Unrelated

PREVIEWS = 2
RECIPE, EVENTS, CHECKPOINTS = "recipe.yaml", "events.jsonl", "checkpoints"


class Course:
    """One adapter's course, in the folder that its recipe names.

    Args:
        recipe: resolved.
        stage: where it takes place; ``adapter`` is attached there.
        sources: what it learns from and is measured on.
        trackers: those that follow it.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        adapter: Adapter,
        sources: Sources,
        trackers: Trackers,
        profiler: Profiler | None = None,
    ) -> None:
        self.recipe, self.adapter, self.sources = recipe, adapter, sources
        self.base, self.engine = stage.base, stage.engine
        self.screen, self._warn = stage.screen, stage.warn
        assert recipe.out is not None  # it is resolved
        self.folder = Path(recipe.out)
        self.trackers, self.profiler = trackers, profiler
        self.total = total_steps(recipe, sources)
        tokenizer = stage.base.tokenizer
        self.measure = (
            Measure(self.engine, sources.held_out, tokenizer, recipe.eval)
            if sources.held_out
            else None
        )
        self.unrelated = Unrelated(self.engine, tokenizer, recipe.eval.forgetting, adapter.name)
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, recipe.checkpoint.keep)
        self.saves_every = saves_every(recipe, self.total)
        self.progress = Progress()
        self.bare: Measured | None = None
        """The bare base on the held-out data, once `before` has measured it."""
        self._latest: tuple[int, Measured] | None = None
        check_sites(stage.base, adapter)

    # -- before --------------------------------------------------------------------------------------

    def open(self, *, resume: bool, step: int | None = None) -> None:
        """Open the folder with its recipe and events; and on ``resume``, take up the checkpoint of that ``step``: by
        default the last one; 0 begins anew."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume and (self.folder / RECIPE).exists():
                check_same(self.folder / RECIPE, self.recipe)
            else:
                write_recipe(self.recipe, self.folder / RECIPE)
        except OSError as error:
            raise StorageError(f"cannot write the run's folder {self.folder}: {error}.") from error
        self.checkpoints.sweep()
        last = self.checkpoints.last() if step is None else step
        if not resume or not last:
            torch.manual_seed(self.recipe.seed)
            self.engine.admit(self.adapter.name)
        else:
            extra = self.engine.load(self.checkpoints.path(last), self.adapter.name)
            self.progress = Progress.of(extra)
            self._check_data(self.progress.cursor)
        self.events = Events(self.folder / EVENTS)
        if resume:
            self.events.add("resume", {"step": self.progress.step})
        self.trackers.follow(self.events, self.recipe.model_dump(mode="json"), self._warn)

    def _check_data(self, cursor: Cursor | None) -> None:
        """A finished run, too, belongs to its data."""
        if cursor is not None and cursor["digest"] != self.sources.feed.digest:
            raise DataError(
                f"cannot resume: the content of {self.sources.name} has changed since the run was saved. "
                "Resume with the same data, or start a new run."
            )

    def plan(self, more: Rows) -> None:
        """Show and note what will be done; ``more`` is to be said as well."""
        sources = self.sources
        rows = plan_rows(self.recipe, self.base, self.adapter, sources, total=self.total) + more
        previews = [
            preview(datum, self.base.tokenizer, self.engine.labels)
            for datum in sources.sample[:PREVIEWS]
        ]
        self.screen.plan(rows, previews)
        self.events.add(
            "start",
            {
                "plan": rows,
                "previews": [str(text) for text in previews],
                "total": self.total,
                **start_facts(self.base, self.adapter, sources),
            },
        )

    def before(self, other: Course | None = None) -> None:
        """Measure the bare base, or take the numbers of an ``other`` course on the same data."""
        self.bare = self._before(other)
        self.unrelated.before(self.events, self.screen, None if other is None else other.unrelated)

    def _before(self, other: Course | None) -> Measured | None:
        if self.measure is None:
            return None
        noted = [
            event
            for event in read_events(self.folder / EVENTS)
            if event.get("event") == "eval" and event["of"] == "base"
        ]
        if noted:  # a resumed run
            return Measured.of(noted[-1])
        before = self.measure.full(None) if other is None or other.bare is None else other.bare
        self.screen.measured("base", before)
        self.events.add("eval", {"step": 0, "of": "base", **before.fields()})
        return before

    # -- steps ---------------------------------------------------------------------------------------

    def steps(self, asked: Callable[[], bool]) -> Generator[list[Datum], Computed, bool]:
        """The examples of each step that is left; whether it was stopped before the last one, because it was
        ``asked`` to."""
        recipe, progress = self.recipe, self.progress
        epochs = None if recipe.steps is not None else recipe.epochs
        left = 0 if progress.over else self.total - progress.step
        steps: Iterator[Step] = islice(self.sources.feed.steps(epochs, progress.cursor), left)
        if self.profiler is not None:
            steps = self.profiler.watched(steps, left)
        for members, cursor in steps:
            computed = yield members
            self._step(members, cursor, computed)
            evaluated = self._due(recipe.eval.every) and self._evaluate()
            if self._due(self.saves_every) or evaluated or asked():
                self.save()
            if progress.over:
                self._note_early_stop()
                break
            if asked() and progress.step < self.total:
                self.interrupted()
                return True
        return False

    def _step(self, members: list[Datum], cursor: Cursor, computed: Computed) -> None:
        """One optimiser step."""
        recipe, progress, name = self.recipe, self.progress, self.adapter.name
        began = time.perf_counter()
        lr = recipe.optim.rate(progress.step, self.total)
        done: StepResult = self.engine.optim_step(name, recipe.optim.params(lr, self.total))
        seconds = computed.seconds + time.perf_counter() - began
        loss, tokens = computed.loss, sum(map(len, members))
        progress.step += 1
        progress.cursor = cursor
        progress.tokens += tokens
        self.events.add(
            "step",
            {
                "step": progress.step,
                "loss": loss.mean,
                "accuracy": loss.accuracy,
                "lr": lr,
                "grad_norm": done.grad_norm,
                "tokens": progress.tokens,
                "weight": done.weight,
                "seconds": round(seconds, 4),
                "epoch": cursor["epoch"],
                **({"auxiliary": loss.auxiliary} if loss.auxiliary else {}),
            },
        )
        memory = facts.peak_memory(self.base.model.device)
        self.screen.step(progress.step, loss.mean, tokens / seconds, memory)
        if self.profiler is not None:
            self.profiler.done(progress.step, members)

    def _due(self, every: int | None) -> bool:
        return (
            every is not None
            and self.progress.step % every == 0
            and self.progress.step < self.total
        )

    def _evaluate(self) -> bool:
        """A held-out measurement in the middle of a run."""
        if self.measure is None:
            return False
        measured = self.measured(full=self.recipe.eval.midway == "answers")
        self.note(measured)
        self.screen.measured(f"step {self.progress.step}", measured)
        return True

    def measured(self, *, full: bool) -> Measured:
        """The adapter (or its moving average) on the held-out data, as it is now."""
        assert self.measure is not None
        name = self.adapter.name
        with self.engine.averaged(name):
            return self.measure.full(name) if full else self.measure.quick(name)

    def note(self, measured: Measured) -> None:
        """Note a measurement, which may be the best so far, or one too many without a better one."""
        progress = self.progress
        self._latest = progress.step, measured
        progress.measured(measured.held_out.loss.value, self.recipe.eval)
        self.events.add("eval", {"step": progress.step, "of": "adapter", **measured.fields()})

    def latest_at(self, step: int) -> Measured | None:
        """The measurement of that step, where it is the last one."""
        return self._latest[1] if self._latest is not None and self._latest[0] == step else None

    def _note_early_stop(self) -> None:
        progress = self.progress
        assert progress.best is not None
        self.events.add("stop", {"step": progress.step, "best": progress.best[0]})
        self.screen.note(
            f"stopped early after step {progress.step}: no lower held-out loss since step {progress.best[0]}.",
            "yellow",
        )

    def interrupted(self) -> None:
        """Note that someone asked to stop here."""
        step = self.progress.step
        self.events.add("interrupted", {"step": step})
        self.screen.note(f"stopped after step {step}; resume the run to go on.", "yellow")

    def save(self) -> None:
        """Write a checkpoint."""
        step = self.progress.step
        self.engine.save(self.adapter.name, self.checkpoints.path(step), self.progress.fields())
        self.events.add("checkpoint", {"step": step})
        self.checkpoints.prune(None if self.progress.best is None else self.progress.best[0])

    # -- after ---------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """Note what ended it."""
        with suppress(StorageError):
            self.events.add("error", {"step": self.progress.step, "message": str(error)})

    def close(self) -> None:
        """Let go of the events; nothing is added after this."""
        with suppress(StorageError):
            self.events.close()
