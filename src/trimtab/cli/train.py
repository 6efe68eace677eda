"""``trimtab train``: from a recipe, or from a few options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from trimtab.errors import ConfigError

INTERRUPTED = 130


def train(
    arguments: list[str] = typer.Argument(
        None,
        metavar="[RECIPE] [a.b=c ...]",
        help="A recipe (YAML), or with --resume a run's folder; then overrides.",
    ),
    model: str = typer.Option(None, "--model", "-m", help="Folder, hub id or .gguf of the base."),
    data: str = typer.Option(None, "--data", "-d", help="JSONL file to train on."),
    held_out: str = typer.Option(None, "--held-out", help="JSONL file to measure on."),
    method: str = typer.Option(None, "--method", help="For example 'lora(rank=16)'."),
    name: str = typer.Option(None, "--name", help="Name of the adapter."),
    epochs: int = typer.Option(None, "--epochs", help="Passes over the data."),
    out: str = typer.Option(None, "--out", "-o", help="Folder of the run."),
    track: list[str] = typer.Option(
        None, "--track", help="tensorboard, mlflow, wandb or trackio; may be repeated."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print nothing but errors."),
) -> None:
    """Fine-tune an adapter.

    trimtab train recipe.yaml optim.lr=1e-4

    trimtab train --model M --data F --method "lora(rank=16)" --held-out G
    """
    from trimtab.train.recipe_file import make_recipe, read_values

    recipe_path, overrides = _parted(arguments or [])
    values: dict[str, Any] = {}
    where = "recipe"
    if recipe_path is not None:
        path = Path(recipe_path)
        if path.is_dir():
            if not resume:
                raise ConfigError(
                    f"{path} is a folder; name a recipe file, or add --resume to go on with that run."
                )
            out = out or str(path)
            path = path / "recipe.yaml"
        values, where = read_values(path), path.name
    options = {
        "model": model, "data.path": data, "data.held_out": held_out, "method": method, "name": name,
        "epochs": epochs, "out": out,
    }  # fmt: skip
    given = [f"{key}={_quoted(value)}" for key, value in options.items() if value is not None]
    if track:
        given.append(f"track=[{', '.join(map(_quoted, track))}]")
    if not values and model is None and data is None:
        raise ConfigError("name a recipe, or give --model and --data; see trimtab train --help.")
    recipe = make_recipe(values, [*given, *overrides], where=where)

    from trimtab.train.api import train_recipe

    if train_recipe(recipe, resume=resume, quiet=quiet).status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _parted(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's path, if the first argument is one, and the overrides."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], arguments[1:]
    return None, arguments


def _quoted(value: object) -> str:
    """An option's text as YAML that means just that text."""
    return f"'{value.replace(chr(39), chr(39) * 2)}'" if isinstance(value, str) else str(value)
