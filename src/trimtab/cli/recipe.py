"""``trimtab recipe``: begin a recipe, and what editors need to help with it."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from trimtab.errors import ConfigError, StorageError

app = typer.Typer(help="Begin a recipe; check one.", no_args_is_help=True)


@app.command("init")
def init(
    model: str = typer.Option(..., "--model", "-m", help="Folder, hub id or .gguf of the base."),
    data: str = typer.Option(
        ..., "--data", "-d", help="What is learnt: file, folder or data set id."
    ),
    task: str = typer.Option(
        None, "--task", "-t", help="See trimtab recipe tasks; by default, what suits the rows."
    ),
    out: Path = typer.Option(
        Path("recipe.yaml"), "--out", "-o", help="File to write; - prints it."
    ),
) -> None:
    """Write a commented recipe for a model, a data file and a task."""
    from trimtab.data import open_source
    from trimtab.train.starter import starter

    if str(out) != "-" and out.exists():
        raise ConfigError(f"{out} exists already; name another file with --out.")
    chosen, text = starter(model, open_source(data), data, task)
    if str(out) == "-":
        typer.echo(text, nl=False)
        return
    _write(out, text)
    typer.echo(
        f"{out}: a recipe for {chosen}. Next: trimtab data preview {out}, trimtab plan {out}, trimtab train {out}"
    )


@app.command("tasks")
def tasks() -> None:
    """List the tasks that a recipe can begin with."""
    from trimtab.train.starter import tasks as known

    for name, purpose in known().items():
        typer.echo(f"{name:<10} {purpose}")


@app.command("schema")
def schema(
    out: Path = typer.Option(None, "--out", "-o", help="File to write; by default it is printed."),
) -> None:
    """Export the JSON Schema of recipes, which editors complete and check with.

    In a recipe, name it in the first line: # yaml-language-server: $schema=recipe.schema.json
    """
    from trimtab.train.recipe import Recipe

    text = json.dumps(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()},
        indent=2,
    )
    if out is None:
        typer.echo(text)
    else:
        _write(out, text + "\n")


@app.command("check")
def check(
    file: Path = typer.Argument(..., help="Recipe (YAML)."),
    overrides: list[str] = typer.Argument(None, metavar="[a.b=c ...]", help="Overrides."),
) -> None:
    """Check a recipe and print it with everything filled in."""
    from trimtab.train.recipe_file import read_recipe, recipe_text

    typer.echo(recipe_text(read_recipe(file, overrides or [])), nl=False)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; name another file with --out."
        ) from error
