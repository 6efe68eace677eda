"""A recipe from what was typed: a file or a few options, then overrides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.train.recipe import Recipe

ARGUMENTS = typer.Argument(
    None,
    metavar="[RECIPE] [a.b=c ...]",
    help="A recipe (YAML) or a run's folder; then overrides.",
)
MODEL = typer.Option(None, "--model", "-m", help="Folder, hub id or .gguf file of the base.")
DATA = typer.Option(None, "--data", "-d", help="What is learnt: file, folder or data set id.")
HELD_OUT = typer.Option(None, "--held-out", help="What it is measured on.")
METHOD = typer.Option(None, "--method", help="For example 'lora(rank=16)'.")
STORAGE = typer.Option(
    None,
    "--storage",
    help="Keep the base's linear layers in nf4, fp4, int4, int8, int8-group, fp8 or loftq(rank=16).",
)
EXEMPT = typer.Option(
    [], "--exempt", help="Layers to keep dense, or with =int8 in that format (may be repeated)."
)
AVERAGE_BITS = typer.Option(
    None, "--average-bits", help="Keep the worst of them in int8, up to so many bits a weight."
)
NAME = typer.Option(None, "--name", help="Name of the adapter.")
EPOCHS = typer.Option(None, "--epochs", help="Passes over the data.")
OUT = typer.Option(None, "--out", "-o", help="Folder of the run.")


def given_recipe(arguments: list[str], options: dict[str, Any]) -> Recipe:
    """The recipe: a file's values, or none; then ``options`` by dotted name (None: not given), then overrides.

    The folder of a run stands for its recipe.
    """
    from trimtab.train.recipe_file import make_recipe

    values, overrides, where = given_values(arguments, options)
    return make_recipe(values, overrides, where=where)


def given_values(
    arguments: list[str], options: dict[str, Any]
) -> tuple[dict[str, Any], list[str], str]:
    """A recipe's values, not yet validated; the overrides; and the name of the values' source in errors."""
    from trimtab.train.recipe_file import read_values

    path, overrides = _parted(arguments)
    values: dict[str, Any] = {}
    where = "recipe"
    if path is not None:
        file = Path(path)
        if file.is_dir():
            file = file / "recipe.yaml"
        values, where = read_values(file), file.name
    given = [f"{key}={_quoted(value)}" for key, value in options.items() if value is not None]
    if not values and options.get("model") is None and options.get("data.path") is None:
        raise ConfigError("name a recipe, or give --model and --data; see --help.")
    return values, [*given, *overrides], where


def run_folder_of(arguments: list[str]) -> str | None:
    """The first argument, if it is a folder."""
    path, _ = _parted(arguments)
    return path if path is not None and Path(path).is_dir() else None


def _parted(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's path, if the first argument is one, and the overrides."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], arguments[1:]
    return None, arguments


def _quoted(value: object) -> str:
    """An option's value as YAML that means just that."""
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    return f"'{value.replace(chr(39), chr(39) * 2)}'" if isinstance(value, str) else str(value)
