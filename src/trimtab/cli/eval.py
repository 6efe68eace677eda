"""``trimtab eval``: a base and adapters on it, measured on the same data or tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trimtab.cli.bases import AVERAGE_BITS, DENSE, EXEMPT, STORAGE, open_base
from trimtab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trimtab.evals import Evaluation
    from trimtab.models.load import Base
    from trimtab.train.recipe import DataRecipe, Recipe, TaskName


def evaluate(
    arguments: list[str] = typer.Argument(
        None,
        metavar="[RUN] [a.b=c ...]",
        help="A run's folder: its model, held-out data and adapter; then overrides of its recipe.",
    ),
    model: str = typer.Option(None, "--model", "-m", help="Folder, hub id or .gguf of the base."),
    adapters: list[str] = typer.Option(
        [], "--adapter", "-a", help="Adapter folder, or a run's (may be repeated)."
    ),
    data: str = typer.Option(None, "--data", "-d", help="File of examples to measure on."),
    metrics: list[str] = typer.Option(
        [],
        "--metric",
        help="Compare answers too: exact, choice, f1, token_f1, json, rouge, bleu or chrf (may be repeated).",
    ),
    limit: int = typer.Option(None, "--limit", "-n", min=1, help="Use so many examples."),
    max_tokens: int = typer.Option(
        None, "--max-tokens", min=1, help="Most tokens of an answer; the longest reference's."
    ),
    no_base: bool = typer.Option(False, "--no-base", help="Leave the bare base out."),
    tasks: str = typer.Option(
        None, "--tasks", help="Tasks of lm-eval, for example arc_easy,hellaswag."
    ),
    include: Path = typer.Option(None, "--include", help="Folder with task files of your own."),
    fewshot: int = typer.Option(None, "--fewshot", min=0, help="Examples in a task's prompt."),
    chat: bool = typer.Option(False, "--chat", help="Ask tasks through the chat template."),
    dtype: str = typer.Option(None, "--dtype", help="Of the base's weights."),
    storage: str = STORAGE,
    exempt: list[str] = EXEMPT,
    average_bits: float = AVERAGE_BITS,
    out: Path = typer.Option(None, "--out", "-o", help="Write the results as JSON, too."),
) -> None:
    """Measure a base and adapters on the same held-out data, or on tasks of lm-eval.

    trimtab eval runs/first

    trimtab eval --model M --adapter A --adapter B --data held.jsonl --metric f1 data.train=last

    trimtab eval --model M --adapter A --tasks arc_easy --limit 100
    """
    run, overrides = _parted(arguments or [])
    job = _job(run, overrides, model, adapters, data, metrics, limit, max_tokens, dtype, tasks)
    if no_base and not job.adapters:
        raise ConfigError("--no-base leaves nothing to measure; name an adapter.")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"the results cannot be written to {out}; name a file in a folder.")

    from rich.console import Console

    from trimtab.cli.adapters import attach_adapters, read_adapters
    from trimtab.cli.eval_table import show, write
    from trimtab.engine import keep_memory
    from trimtab.evals import evaluate_tasks, merged
    from trimtab.evals import metrics as known

    for name in job.metrics:
        known.get(name)
    saved = read_adapters(job.adapters)
    classifies = job.task == "sequence-classification"
    asked = (storage, exempt, average_bits)
    base = open_base(
        job.model,
        saved.values(),
        *(asked if storage or exempt or average_bits is not None else job.stored),
        dtype=job.dtype,
        device=job.device,
        task=job.task,
        labels=job.data.labels if classifies and job.data is not None else None,
    )
    if base.model.device.type == "cpu":
        keep_memory()
    attached = attach_adapters(base, saved)
    names: list[str | None] = [*attached] if no_base else [None, *attached]
    facts: dict[str, Any] = {
        "model": job.model,
        "adapters": dict(zip(attached, job.adapters, strict=True)),
    }
    rows: list[Evaluation] = []
    if job.data is not None:
        with Console(stderr=True).status("measuring"):
            rows = _measured(job, base, names, facts)
    if tasks is not None:
        listed = [task.strip() for task in tasks.split(",") if task.strip()]
        done = evaluate_tasks(
            base, listed, names, include=include, limit=limit, fewshot=fewshot, chat=chat
        )
        rows = merged(rows, done) if rows else done
    show(Console(highlight=False), rows, facts)
    if out is not None:
        write(out, rows, facts)


@dataclass(frozen=True)
class _Job:
    """What is measured; ``data`` None: no examples. ``held_out``: which side of the data; ``limit``: how many
    examples; ``asked``: how many of them are answered."""

    model: str
    task: TaskName
    adapters: list[str]
    data: DataRecipe | None
    held_out: bool
    metrics: tuple[str, ...]
    limit: int | None
    asked: int | None
    max_tokens: int | None
    dtype: str | None
    device: str | None
    stored: tuple[str | None, Sequence[str], float | None] = (None, (), None)
    """How a run's recipe stores the base."""


def _parted(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The run's folder, if the first argument is one, and the overrides."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_dir()):
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def _job(
    run: Path | None,
    overrides: list[str],
    model: str | None,
    adapters: list[str],
    data: str | None,
    metrics: list[str],
    limit: int | None,
    max_tokens: int | None,
    dtype: str | None,
    tasks: str | None,
) -> _Job:
    """The options, and what a run's recipe says where they say nothing."""
    from trimtab.train.recipe_file import make_recipe
    from trimtab.train.sources import with_labels

    if run is None:
        if model is None:
            raise ConfigError("name a run's folder, or give --model; see trimtab eval --help.")
        if data is None and tasks is None:
            raise ConfigError("give --data, or --tasks, to measure on.")
        source = None
        task: TaskName = "causal-lm"
        if data is not None:
            given = with_labels(make_recipe({"model": model, "data": {"path": data}}, overrides))
            source, task = given.data, given.task
        _check_data(source, metrics)
        return _Job(
            model,
            task,
            adapters,
            source,
            False,
            tuple(metrics),
            limit,
            None,
            max_tokens,
            dtype,
            None,
        )
    recipe, adapter = _of_run(run, overrides)
    whole = data is None and tasks is None
    source = recipe.data if whole else None
    if data is not None:
        source = recipe.data.replace(path=data, mix=(), held_out=None, fraction=0.0)
    if whole and recipe.data.held_out is None and not recipe.data.fraction:
        raise DataError(f"{run} was trained without held-out data; give --data, or --tasks.")
    _check_data(source, metrics)
    asked = recipe.eval
    return _Job(
        model or recipe.model,
        recipe.task,
        [adapter, *adapters],
        source,
        whole,
        tuple(metrics) or (asked.metrics if source is not None else ()),
        limit,
        asked.limit if limit is None else None,
        max_tokens or asked.max_tokens,
        dtype or recipe.dtype,
        recipe.device,
        (recipe.storage or DENSE, recipe.exempt, recipe.average_bits),
    )


def _check_data(source: DataRecipe | None, metrics: list[str]) -> None:
    if source is None and metrics:
        raise ConfigError("--metric compares answers to examples; give --data as well.")


def _of_run(run: Path, overrides: list[str]) -> tuple[Recipe, str]:
    """The recipe of a run, and the folder of its adapter."""
    from trimtab.train.recipe_file import read_recipe

    if not (run / "recipe.yaml").is_file():
        raise ConfigError(
            f"{run} is not a run's folder (it has no recipe.yaml); see trimtab eval --help."
        )
    if not (run / "adapter").is_dir():
        raise ConfigError(f"{run} has no adapter yet; go on with: trimtab train {run} --resume")
    return read_recipe(run / "recipe.yaml", overrides), str(run / "adapter")


def _measured(
    job: _Job, base: Base, names: list[str | None], facts: dict[str, Any]
) -> list[Evaluation]:
    """Every adapter on the examples."""
    from trimtab.engine import Engine
    from trimtab.evals import evaluate as measure
    from trimtab.evals import questions, some
    from trimtab.train.sources import read_examples_of

    assert job.data is not None
    engine = Engine(base)
    limits = [limit for name in names if (limit := engine.context(name)) is not None]
    examples, notes = read_examples_of(
        job.data,
        base.tokenizer,
        min(limits, default=None),
        held_out=job.held_out,
        task=job.task,
    )
    used = some(examples, job.limit)
    held = job.data.held_out
    facts["data"] = job.data.path if held is None else held if isinstance(held, str) else held.path
    facts["examples"] = len(used)
    facts["notes"] = list(notes)
    facts["unit"] = "text" if engine.labels else "token"
    if job.metrics:
        asked = questions(some(used, job.asked), base.tokenizer, engine.labels)
        facts["references"] = [one.reference for one in asked]
    return measure(
        base, used, names, metrics=job.metrics, asked=job.asked, max_tokens=job.max_tokens
    )
