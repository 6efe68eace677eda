"""How a round begins, or goes on: adapters attached, data read, courses opened at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rich.console import Console

from trimtab.adapt.adapter import Adapter
from trimtab.errors import ConfigError
from trimtab.models.load import Base
from trimtab.train import facts
from trimtab.train.course import Course
from trimtab.train.page import sized
from trimtab.train.recipe import Recipe
from trimtab.train.screen import Screen
from trimtab.train.setup import attached, resolved, total_steps
from trimtab.train.sources import Sources
from trimtab.train.stage import Stage
from trimtab.train.sweep.contestant import Contestant
from trimtab.train.sweep.halving import Rung
from trimtab.train.sweep.record import Entry
from trimtab.train.sweep.resuming import Saved, moments
from trimtab.train.sweep.round import bound
from trimtab.train.sweep.sources import Library
from trimtab.train.sweep.variants import Variant
from trimtab.train.trackers import Trackers

CHECKPOINTS = 10
"""Of the longest variant, where the recipe does not say how often."""
KEPT = 2
"""Checkpoints that a variant keeps at least: one may be of a later moment than another's last."""


@dataclass(frozen=True)
class Ready:
    """A variant with its adapter attached and its data read."""

    variant: Variant
    entry: Entry
    recipe: Recipe
    adapter: Adapter
    sources: Sources


def readied(
    stage: Stage, variants: Sequence[Variant], entries: Sequence[Entry], library: Library
) -> list[Ready]:
    """The variants that are to be trained, and the number of their steps in their entries.

    Raises:
        ConfigError: there is not enough memory to train them all, or they are not measured alike.
        TrimtabError: whatever stops a run of one of them before its first step.
    """
    found: list[Ready] = []
    for variant, entry in zip(variants, entries, strict=True):
        if entry.status != "running":
            continue
        adapter = attached(variant.recipe, stage.base)
        recipe = resolved(variant.recipe, stage.base, adapter, variant.folder)
        ready = Ready(
            variant,
            entry,
            recipe,
            adapter,
            library.read(recipe, stage.engine.context(adapter.name)),
        )
        entry.total = total_steps(recipe, ready.sources)
        found.append(ready)
        _check_memory(stage.base, found, len(variants))
    return found


def opened(
    stage: Stage,
    ready: Sequence[Ready],
    entries: Sequence[Entry],
    rungs: Sequence[Rung],
    decided: int,
    *,
    resume: bool,
) -> list[Contestant]:
    """Their courses, which begin; or on ``resume`` go on at the last moment of which all have their state."""
    shown = replace(stage, screen=Screen(Console(quiet=True)))
    every = -(-max(entry.total for entry in entries) // CHECKPOINTS)
    courses = [_course(shown, one, every) for one in ready]
    steps = [0] * len(courses)
    if resume:
        steps = moments(
            [
                Saved(frozenset(c.checkpoints.steps()), bound(rungs, decided, c.total))
                for c in courses
            ]
        )
    with ExitStack() as stack:
        for step, course in zip(steps, courses, strict=True):
            course.checkpoints.forget_after(step)
            course.open(resume=resume, step=step)
            stack.callback(course.close)
        for course in courses:
            course.plan([])
            course.before(courses[0])
        stack.pop_all()
    return [Contestant(one.variant, c, one.entry) for one, c in zip(ready, courses, strict=True)]


def _course(stage: Stage, one: Ready, every: int) -> Course:
    """The course of a variant, whose checkpoints are of the same steps as the others'."""
    checkpoint = one.recipe.checkpoint
    kept = checkpoint.replace(every=checkpoint.every or every, keep=max(checkpoint.keep, KEPT))
    recipe = one.recipe.replace(checkpoint=kept)
    return Course(recipe, stage, one.adapter, one.sources, Trackers(recipe.track))


def training_bytes(ready: Sequence[Ready]) -> int:
    """What training takes for the adapters: values, gradients and two moments, in float32."""
    return sum(
        one.adapter.count * (16 if one.recipe.memory.optimiser == "device" else 8) for one in ready
    )


def _check_memory(base: Base, ready: Sequence[Ready], count: int) -> None:
    """Raise `ConfigError` where what the base and these adapters hold is more than the device has."""
    device = base.model.device
    most = facts.whole_memory(device)
    own = {p.data_ptr() for one in ready for p in one.adapter.parameters()}
    tensors = (*base.model.parameters(), *base.model.buffers())
    held = sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in own)
    needed = training_bytes(ready)
    if most is not None and held + needed > most:
        raise ConfigError(
            f"the base takes {sized(held)}, and training {len(ready)} of {count} variants {sized(needed)} beside it, "
            f"of {sized(most)} on {device}: train fewer at once (--together), or smaller ones."
        )
