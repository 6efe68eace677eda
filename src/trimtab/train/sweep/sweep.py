"""A sweep, and everything that it leaves on disk.

    sweep.json       what was asked, the variants, and what was decided
    variants/000/    each variant's run, as trimtab train leaves one; one that was stopped can be resumed by itself
    adapter/         the winner's, beside the recipe.yaml that made it
    report.html      the table and the curves

A variant that is trained to its end is the run that its recipe makes alone, up to rounding; with dropout it is another
draw of it, because its texts lie in other micro-batches.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimtab.adapt.attach import detach
from trimtab.adapt.bank import find_bank
from trimtab.adapt.disk import replacing
from trimtab.engine import Engine
from trimtab.errors import StorageError, TrainingError
from trimtab.train.course import RECIPE
from trimtab.train.ending import ADAPTER
from trimtab.train.interrupt import Interrupt
from trimtab.train.screen import Screen
from trimtab.train.setup import folder_of, loaded
from trimtab.train.stage import Stage
from trimtab.train.sweep.halving import rungs
from trimtab.train.sweep.outset import opened, readied
from trimtab.train.sweep.page import write_sweep_report
from trimtab.train.sweep.plan import plan_rows
from trimtab.train.sweep.record import FILE, Asked, Entry, Record
from trimtab.train.sweep.round import Round
from trimtab.train.sweep.samplers import samplers
from trimtab.train.sweep.sources import Library
from trimtab.train.sweep.space import space_of
from trimtab.train.sweep.variants import Variant, Variants, labelled


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended. ``winner`` is the variant with the lowest held-out loss of those that were trained to their
    end; its adapter lies in the folder."""

    folder: Path
    status: Literal["finished", "interrupted"]
    winner: Entry | None
    entries: Sequence[Entry]


class Sweep:
    """One execution of a sweep. Call `go` once.

    Args:
        resume: go on with the one in the folder ``out``.
        out: the sweep's folder; None makes a new one below ``runs``.

    Raises:
        ConfigError: options that are no sweep; or on ``resume``, others than before.
        MissingPackageError: the sampler's package is not installed.
    """

    def __init__(
        self, asked: Asked, screen: Screen, *, out: str | None = None, resume: bool = False
    ) -> None:
        self.screen = screen
        space = space_of(asked.options)
        kind = samplers.get(asked.config.sampler)
        self.sampler = kind(space.axes, asked.config)
        self.folder = folder_of(out, "sweep", resume=resume)
        self.resume = resume and _begun(self.folder)
        if self.resume:
            self.record = Record.read(self.folder)
            self.record.check_same(asked)
        else:
            self.record = Record(self.folder, asked)
        self.config = asked.config
        self.variants = Variants(asked.recipe, space, self.folder, asked.where)
        if asked.config.together is not None:  # what is wrong in a later round is told now
            checked, sampler = self.variants.another(), kind(space.axes, asked.config)
            while choices := sampler.ask():
                checked.make(choices)
        self._stage: Stage | None = None
        self._library: Library | None = None

    def go(self) -> SweepOutcome:
        """Train all variants that do not lose on the way, and keep the best.

        Raises:
            TrainingError: every variant failed.
            StorageError: the disk is full; everything saved before is intact.
            TrimtabError: whatever stops a run of a variant before its first step.
        """
        record, number = self.record, 0
        while choices := self.sampler.ask():
            variants = labelled(self.variants.make(choices))
            entries = record.round(number, choices)
            if number >= record.rounds:
                if self._train(variants, entries):
                    return self._ended("interrupted")
                record.rounds, record.decided = number + 1, 0
                record.write()
            for entry in entries:
                loss = None if entry.status == "failed" else entry.loss
                whole = entry.status == "finished"
                self.sampler.tell(entry.choice, entry.step, loss, whole=whole)
            number += 1
        return self._ended("finished")

    # -- a round -------------------------------------------------------------------------------------

    def _train(self, variants: Sequence[Variant], entries: Sequence[Entry]) -> bool:
        """One round; whether it was stopped because someone asked to."""
        stage, library = self._opened(variants[0])
        began = any(variant.folder.exists() for variant in variants)
        try:
            ready = readied(stage, variants, entries, library)
            totals = [entry.total for entry in entries]
            decisions = rungs(len(entries), self.config.eta, self.config.first, totals)
            rows = plan_rows(stage.base, ready, entries, decisions)
            self.screen.plan([*rows, ("folder", str(self.folder))], [])
            self.record.write()
            contestants = opened(
                stage, ready, entries, decisions, self.record.decided, resume=self.resume and began
            )
            with Interrupt() as interrupt:
                return Round(stage, contestants, entries, decisions, self.record, interrupt).go()
        finally:
            bank = find_bank(stage.base.model)
            for name in [] if bank is None else list(bank.adapters):
                detach(stage.base.model, name)
                stage.engine.forget(name)

    def _opened(self, variant: Variant) -> tuple[Stage, Library]:
        """The base and what stands on it, which are of all rounds."""
        if self._stage is None or self._library is None:
            recipe = variant.recipe
            base = loaded(recipe)
            engine = Engine(base, micro_tokens=recipe.batch.micro_tokens, memory=recipe.memory)
            self.screen.unit = "text" if engine.labels else "token"
            self._stage = Stage(base, engine, self.screen, self.screen.note)
            self._library = Library(base.tokenizer, self.screen.reading)
        return self._stage, self._library

    # -- the end -------------------------------------------------------------------------------------

    def _ended(self, status: Literal["finished", "interrupted"]) -> SweepOutcome:
        record = self.record
        finished = [entry for entry in record.entries if entry.status == "finished"]
        best = min(finished, key=lambda entry: (entry.loss, entry.number), default=None)
        if status == "interrupted":
            self.screen.note("stopped; the same command with --resume goes on.", "yellow")
            best = None
        elif best is not None:
            record.winner = best.number
            self._keep(best)
        record.write()
        write_sweep_report(self.folder)
        if status == "finished" and best is None:
            raise TrainingError(
                f"all {len(record.entries)} variants failed; the first: {record.entries[0].why} See {self.folder}."
            )
        return SweepOutcome(self.folder, status, best, record.entries)

    def _keep(self, winner: Entry) -> None:
        """The winner's adapter and recipe in the sweep's folder."""
        source = self.variants.made[winner.number].folder
        with replacing(self.folder / ADAPTER) as temporary:
            shutil.copytree(source / ADAPTER, temporary, dirs_exist_ok=True)
        try:
            shutil.copyfile(source / RECIPE, self.folder / RECIPE)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder / RECIPE}: {error}.") from error


def _begun(folder: Path) -> bool:
    """Whether there is anything in it, but for what a killed process left half-written."""
    return folder.is_dir() and any(entry.name != f".{FILE}" for entry in folder.iterdir())
