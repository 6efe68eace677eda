"""The two ways to start a run: with a base and an adapter at hand, or from a recipe alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.fingerprint import storage_of
from trimtab.adapt.tree import anatomy_of
from trimtab.engine import keep_memory
from trimtab.engine.class_head import labels_of
from trimtab.models.load import Base
from trimtab.models.storage import can_ask
from trimtab.train.recipe import Recipe
from trimtab.train.recipe_file import make_recipe
from trimtab.train.run import Outcome, Run
from trimtab.train.screen import Screen
from trimtab.train.setup import opened_base


def train(
    base: Base,
    adapter: Adapter,
    data: object,
    *,
    held_out: object = None,
    epochs: int = 1,
    steps: int | None = None,
    lr: float | None = None,
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
    profile: bool = False,
) -> Outcome:
    """Train an attached adapter on a file of examples.

    Args:
        base: what `trimtab.load` gave; ``adapter`` is attached to its model. A sequence classifier learns the classes
            of labelled texts, and its labels are the only ones allowed.
        data: a file or folder of examples, the id of a data set on the hub, or Python rows: a
            ``datasets.Dataset``, or a sequence of dicts.
        held_out: the same, to measure on.
        lr: None is the method's default.
        out: the run's folder; None makes a new one below ``runs``.
        options: any other option of the recipe by its dotted name, ``{"optim.schedule": "cosine"}``.
        resume: go on from the last checkpoint in ``out``.
        quiet: print nothing.
        profile: watch a few of the steps, and say where time and memory went.

    Raises:
        TrimtabError: see `Run`. On a CPU the process keeps freed memory from here on (`keep_memory`).
    """
    labels = labels_of(base.model)
    values: dict[str, Any] = {
        "model": base.name,
        "task": "sequence-classification" if labels else "causal-lm",
        "data": {
            "path": _named(data),
            "held_out": None if held_out is None else _named(held_out),
            "labels": labels or None,
        },
        "method": adapter.method.to_dict(),
        "name": adapter.name,
        "epochs": epochs,
        "steps": steps,
        "optim": {"lr": lr},
        "out": None if out is None else str(out),
    }
    storage, exempt = storage_of(anatomy_of(base.model).modules)
    if can_ask(base.name, storage, exempt):
        values |= {"storage": storage, "exempt": list(exempt)}
    recipe = make_recipe(values, options or {})
    return _run(
        recipe,
        base,
        adapter,
        resume=resume,
        quiet=quiet,
        profile=profile,
        data=_object(data),
        held_out=_object(held_out),
    )


def _object(data: object) -> object:
    """What is not a path."""
    return None if isinstance(data, str | Path) else data


def _named(data: object) -> str:
    """The path, or in words what stands in its place."""
    return str(data) if isinstance(data, str | Path) else f"<{type(data).__name__}>"


def train_recipe(
    recipe: Recipe, *, resume: bool = False, quiet: bool = False, profile: bool = False
) -> Outcome:
    """Load the base of a recipe, attach its method, and train."""
    recipe, base, adapter = opened_base(recipe)
    return _run(recipe, base, adapter, resume=resume, quiet=quiet, profile=profile)


def _run(
    recipe: Recipe,
    base: Base,
    adapter: Adapter,
    *,
    resume: bool,
    quiet: bool,
    profile: bool,
    data: object = None,
    held_out: object = None,
) -> Outcome:
    if base.model.device.type == "cpu":
        keep_memory()
    screen = Screen(Console(quiet=quiet, highlight=False))
    run = Run(
        recipe,
        base,
        adapter,
        screen,
        resume=resume,
        data=data,
        held_out=held_out,
        profile=profile,
    )
    return run.go()
