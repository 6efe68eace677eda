"""The loop over the engine's verbs, and everything that a run leaves on disk.

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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.export import exported
from trimtab.data import Cursor, Datum, preview
from trimtab.data.feed import Step
from trimtab.engine import Engine, LossResult, StepResult
from trimtab.errors import (
    DataError,
    NonFiniteLossError,
    StorageError,
    TrimtabError,
)
from trimtab.models.load import Base
from trimtab.train import facts
from trimtab.train.checkpoints import Checkpoints
from trimtab.train.events import Events, read_events
from trimtab.train.frozen import kept_below
from trimtab.train.interrupt import Interrupt
from trimtab.train.measure import EACH, Measure, Measured
from trimtab.train.profiler import Profiler
from trimtab.train.progress import Progress
from trimtab.train.recipe import Recipe
from trimtab.train.recipe_file import write_recipe
from trimtab.train.report import write_report
from trimtab.train.screen import Screen
from trimtab.train.setup import (
    check_same,
    check_sites,
    plan_rows,
    provenance,
    resolved,
    run_folder,
    saves_every,
    start_facts,
    total_steps,
)
from trimtab.train.sources import Sources, read_sources
from trimtab.train.trackers import Trackers
from trimtab.train.unrelated import Unrelated

PREVIEWS = 2
RECIPE, EVENTS, CHECKPOINTS, ADAPTER, REPORT = (
    "recipe.yaml", "events.jsonl", "checkpoints", "adapter", "report.html",
)  # fmt: skip


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
        self.trackers = Trackers(recipe.track)
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
        self.total = total_steps(self.recipe, self.sources)
        self.measure = (
            Measure(self.engine, self.sources.held_out, base.tokenizer, self.recipe.eval)
            if self.sources.held_out
            else None
        )
        self.unrelated = Unrelated(
            self.engine, base.tokenizer, self.recipe.eval.forgetting, adapter.name
        )
        self.engine.frozen, self.kept = kept_below(
            self.recipe,
            self.engine,
            adapter,
            self.sources,
            self.unrelated.data,
            total=self.total,
            note=lambda text: screen.note(text, "yellow"),
        )
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.recipe.checkpoint.keep)
        self.saves_every = saves_every(self.recipe, self.total)
        self.progress = Progress()
        check_sites(base, adapter)
        self._open(resume)

    # -- before --------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> None:
        """The folder, its recipe and events; and on resume, the last checkpoint."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume and (self.folder / RECIPE).exists():
                check_same(self.folder / RECIPE, self.recipe)
            else:
                write_recipe(self.recipe, self.folder / RECIPE)
        except OSError as error:
            raise StorageError(f"cannot write the run's folder {self.folder}: {error}.") from error
        self.checkpoints.sweep()
        last = self.checkpoints.last() if resume else None
        if last is None:
            torch.manual_seed(self.recipe.seed)
        else:
            extra = self.engine.load(self.checkpoints.path(last), self.adapter.name)
            self.progress = Progress.of(extra)
            self._check_data(self.progress.cursor)
        self.events = Events(self.folder / EVENTS)
        if resume:
            self.events.add("resume", {"step": self.progress.step})
        self.trackers.follow(self.events, self.recipe.model_dump(mode="json"), self.screen.note)

    def _check_data(self, cursor: Cursor | None) -> None:
        """A finished run, too, belongs to its data."""
        if cursor is not None and cursor["digest"] != self.sources.feed.digest:
            raise DataError(
                f"cannot resume: the content of {self.sources.name} has changed since the run was saved. "
                "Resume with the same data, or start a new run."
            )

    def _plan(self) -> None:
        """Show and note what will be done."""
        recipe, sources = self.recipe, self.sources
        rows = plan_rows(
            recipe,
            self.base,
            self.adapter,
            sources,
            total=self.total,
        )
        rows += self.kept
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

    # -- the run -------------------------------------------------------------------------------------

    def go(self) -> Outcome:
        """Train to the end, or until someone asks to stop.

        Raises:
            NonFiniteLossError: the loss is not finite; the last checkpoint is kept and named.
            StorageError: the disk is full; everything saved before is intact.
        """
        try:
            self._plan()
            before = self._before()
            self.unrelated.before(self.events, self.screen)
            stopped = self._loop()
            profile = None if self.profiler is None else self.profiler.profile()
            after = None if stopped else self._finish(before)
        except BaseException as error:
            with suppress(StorageError):
                self.events.add("error", {"step": self.progress.step, "message": str(error)})
            if isinstance(error, NonFiniteLossError | StorageError):
                raise self._located(error) from error
            raise
        finally:
            if self.profiler is not None:
                self.profiler.close()
            if self.engine.frozen is not None:
                self.engine.frozen.close()
            with suppress(StorageError):
                self.events.close()
        write_report(self.folder)
        if self.profiler is not None:
            self.screen.profile(profile)
        status: Literal["finished", "interrupted"] = "interrupted" if stopped else "finished"
        return Outcome(self.folder, status, self.progress.step, before, after)

    def _before(self) -> Measured | None:
        """The bare base on the held-out data."""
        if self.measure is None:
            return None
        noted = [
            event
            for event in read_events(self.folder / EVENTS)
            if event.get("event") == "eval" and event["of"] == "base"
        ]
        if noted:  # a resumed run
            return Measured.of(noted[-1])
        before = self.measure.full(None)
        self.screen.measured("base", before)
        self.events.add("eval", {"step": 0, "of": "base", **before.fields()})
        return before

    def _loop(self) -> bool:
        """All steps that are left; whether someone asked to stop before the last."""
        recipe, progress = self.recipe, self.progress
        epochs = None if recipe.steps is not None else recipe.epochs
        left = 0 if progress.over else self.total - progress.step
        steps: Iterator[Step] = islice(self.sources.feed.steps(epochs, progress.cursor), left)
        if self.profiler is not None:
            steps = self.profiler.watched(steps, left)
        with Interrupt() as interrupt, self.screen.progress(progress.step, self.total):
            for members, cursor in steps:
                self._step(members, cursor)
                evaluated = self._due(recipe.eval.every) and self._evaluate()
                if self._due(self.saves_every) or evaluated or interrupt.wanted:
                    self._save()
                if progress.over:
                    self._note_early_stop()
                    break
                if interrupt.wanted and progress.step < self.total:
                    self.events.add("interrupted", {"step": progress.step})
                    self.screen.note(
                        f"stopped after step {progress.step}; resume the run to go on.", "yellow"
                    )
                    return True
        return False

    def _step(self, members: list[Datum], cursor: Cursor) -> None:
        """One optimiser step."""
        recipe, progress, name = self.recipe, self.progress, self.adapter.name
        began = time.perf_counter()
        lengths = [len(datum) for datum in members]
        self.engine.micro_tokens = max(recipe.batch.micro_tokens, *lengths)
        lr = recipe.optim.rate(progress.step, self.total)
        loss: LossResult = self.engine.forward_backward(members, name, recipe.loss)
        done: StepResult = self.engine.optim_step(name, recipe.optim.params(lr, self.total))
        seconds = time.perf_counter() - began
        progress.step += 1
        progress.cursor = cursor
        progress.tokens += sum(lengths)
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
        self.screen.step(
            progress.step,
            loss.mean,
            sum(lengths) / seconds,
            facts.peak_memory(self.base.model.device),
        )
        if self.profiler is not None:
            self.profiler.done(progress.step, members)

    def _profiler(self, reading: float) -> Profiler:
        """What watches the steps; ``reading`` are the seconds that the data took."""
        return Profiler(
            self.base,
            self.engine,
            self.adapter,
            reading=reading,
            note=lambda found: self.events.add("profile", found.fields()),
        )

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
        measured = self._measured(full=self.recipe.eval.midway == "answers")
        self._note(measured)
        self.screen.measured(f"step {self.progress.step}", measured)
        return True

    def _measured(self, *, full: bool) -> Measured:
        """The adapter (or its moving average) on the held-out data."""
        assert self.measure is not None
        name = self.adapter.name
        with self.engine.averaged(name):
            return self.measure.full(name) if full else self.measure.quick(name)

    def _note(self, measured: Measured) -> None:
        progress = self.progress
        progress.measured(measured.held_out.loss.value, self.recipe.eval)
        self.events.add("eval", {"step": progress.step, "of": "adapter", **measured.fields()})

    def _note_early_stop(self) -> None:
        progress = self.progress
        assert progress.best is not None
        self.events.add("stop", {"step": progress.step, "best": progress.best[0]})
        self.screen.note(
            f"stopped early after step {progress.step}: no lower held-out loss since step {progress.best[0]}.",
            "yellow",
        )

    def _save(self) -> None:
        step = self.progress.step
        self.engine.save(self.adapter.name, self.checkpoints.path(step), self.progress.fields())
        self.events.add("checkpoint", {"step": step})
        self.checkpoints.prune(None if self.progress.best is None else self.progress.best[0])

    # -- after ---------------------------------------------------------------------------------------

    def _finish(self, before: Measured | None) -> Measured | None:
        """The last measurement and checkpoint, and the state that becomes the adapter."""
        progress, final = self.progress, self.recipe.checkpoint.final
        after = None
        if self.measure is not None and final == "last":
            after = self._measured(full=True)
            self._note(after)
        elif self.measure is not None and not progress.over:
            self._note(self._measured(full=False))
        self._save()
        step = progress.step
        if final == "best" and progress.best is not None:
            step = progress.best[0]
            if step != progress.step:
                self.engine.load(self.checkpoints.path(step), self.adapter.name)
                self.screen.note(f"the adapter is that of step {step}, the best one.")
            after = self._measured(full=True)
            self.events.add("eval", {"step": step, "of": "adapter", **after.fields()})
        self.engine.take_average(self.adapter.name)
        if after is not None:
            self.screen.measured("adapter", after)
            self.screen.samples(before, after)
        self.unrelated.after(step, self.events, self.screen)
        metrics = {} if after is None else after.fields()
        self.adapter.origin.provenance = {
            **provenance(self.recipe, self.sources),
            "step": step,
            "tokens": progress.tokens,
            "metrics": {name: value for name, value in metrics.items() if name not in EACH},
        }
        exported(self.adapter).save(self.folder / ADAPTER, bits=self.recipe.checkpoint.bits)
        self.events.add(
            "end",
            {
                "step": progress.step,
                "adapter_step": step,
                "tokens": progress.tokens,
                "peak_bytes": facts.peak_memory(self.base.model.device),
            },
        )
        self.screen.note(
            f"adapter: {self.folder / ADAPTER}\nreport: {self.folder / REPORT}", "green"
        )
        return after

    def _located(self, error: NonFiniteLossError | StorageError) -> TrimtabError:
        """The error with what is saved and how to go on."""
        last = self.checkpoints.last()
        kept = (
            f"The last checkpoint is {self.checkpoints.path(last)}."
            if last
            else "There is no checkpoint yet."
        )
        advice = (
            " Lower the learning rate, or mend those examples."
            if isinstance(error, NonFiniteLossError)
            else ""
        )
        return type(error)(f"step {self.progress.step + 1}: {error} {kept}{advice}")
