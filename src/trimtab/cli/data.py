"""``trimtab data``: look at data before training on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from trimtab.data.check import Checked
    from trimtab.train.recipe import Recipe
    from trimtab.train.sources import Reader

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)

SHOWN = 20
FOUND_PROBLEMS = 1

SOURCE = typer.Argument(..., metavar="FILE", help="File, folder, data set id, or a recipe (YAML).")
OPTIONS = typer.Argument(
    None, metavar="[OPTION=VALUE ...]", help="Data options of a recipe: train=last max_tokens=512."
)
MODEL = typer.Option(
    None, "--model", "-m", help="Whose tokenizer and chat template; no weights are needed."
)


@app.callback()
def _data() -> None:
    """Look at data before training on it."""


@app.command("preview")
def preview(
    file: str = SOURCE,
    options: list[str] = OPTIONS,
    model: str = MODEL,
    rows: int = typer.Option(3, "--rows", "-n", min=0, help="Examples to show."),
) -> None:
    """Show the first examples as the model will see them, trained tokens marked."""
    from itertools import islice

    from trimtab.data import Outcomes, read_examples, strict
    from trimtab.data import preview as show

    recipe, reader = _reader(file, options, model)
    source = reader.open(recipe.data)
    outcomes = Outcomes(reader.config)
    console = _console()
    console.print(f"{source.name}: {source.kind}", style="cyan")
    for example in islice(strict(read_examples(source, reader.renderer, outcomes)), rows):
        console.print()
        console.print(show(example.datum, reader.renderer.tokenizer, reader.labels))
    console.print()
    console.print(f"of the first rows: {outcomes}")


@app.command("stats")
def stats(file: str = SOURCE, options: list[str] = OPTIONS, model: str = MODEL) -> None:
    """Count rows and tokens, and draw how long the examples are."""
    from trimtab.data import Corpus, TokenStats

    recipe, reader = _reader(file, options, model)
    portion, note = reader.portion(reader.open(recipe.data))
    console = _console()
    found = TokenStats.of(Corpus([portion]))
    console.print(note)
    console.print(str(found))
    most = max(count for *_, count in found.bins)
    wide = max(len(f"{low}–{high}") for low, high, _ in found.bins)
    for low, high, count in found.bins:
        bar = "█" * round(40 * count / most) or ("▏" if count else "")
        console.print(f"{f'{low}–{high}':>{wide}} tokens  [green]{bar}[/] {count:,}")


@app.command("check")
def check(
    file: str = SOURCE,
    options: list[str] = OPTIONS,
    model: str = typer.Option(
        None, "--model", "-m", help="Check the tokens too, not only the shape of the rows."
    ),
    held_out: str = typer.Option(None, "--held-out", help="Look for rows that are in both."),
) -> None:
    """List bad rows with their reasons, rows that occur twice, and rows that are held out.

    The exit code is 1 where something was found.
    """
    from trimtab.data import ExampleConfig
    from trimtab.data.check import check as look
    from trimtab.train.recipe_file import make_recipe
    from trimtab.train.sources import held_recipe, opened

    given = [*(options or []), *([f"held_out={held_out}"] if held_out else [])]
    if model is not None or file.endswith((".yaml", ".yml")):
        recipe, reader = _reader(file, given, model)
        config, renderer = reader.config, reader.renderer
    else:
        recipe = make_recipe({"model": "", "data": {"path": file}}, _data_options(given))
        config, renderer = ExampleConfig(), None
    console = _console()
    held = held_recipe(recipe.data)
    checked = []
    for recipe_of in (recipe.data, *recipe.data.mix, *([held] if held else [])):
        source = opened(recipe_of)
        checked.append(look(source, config, renderer))
        _show(console, f"{source.name} ({source.kind})", checked[-1])
    shared = [pair for found in checked[:-1] for pair in checked[-1].shared(found)] if held else []
    if held:
        _list(console, "held-out examples that are trained on as well", _pairs(shared))
    if shared or any(found.problems or found.repeated for found in checked):
        raise typer.Exit(FOUND_PROBLEMS)


def _show(console: Console, name: str, found: Checked) -> None:
    console.print(f"[bold]{name}[/]: {found.outcomes}")
    _list(console, "bad rows", [problem.reason for problem in found.problems])
    _list(console, "rows that occur more than once", _pairs(found.repeated))


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{one} says the same as {other}" for one, other in pairs]


def _list(console: Console, title: str, lines: Sequence[str]) -> None:
    if not lines:
        console.print(f"no {title}", style="green")
        return
    console.print(f"{len(lines):,} {title}:", style="yellow")
    for line in lines[:SHOWN]:
        console.print(f"  {line}", markup=False)
    if len(lines) > SHOWN:
        console.print(f"  … and {len(lines) - SHOWN:,} more")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _reader(file: str, options: list[str] | None, model: str | None) -> tuple[Recipe, Reader]:
    """The recipe and what opens its sources; ``file`` is the data, or a recipe."""
    from trimtab.errors import ConfigError
    from trimtab.models.load import load_tokenizer
    from trimtab.train.recipe_file import make_recipe, read_values
    from trimtab.train.sources import Reader, with_labels

    if file.endswith((".yaml", ".yml")):
        values = read_values(file)
        if model is not None:
            values["model"] = model
    elif model is None:
        raise ConfigError("name the model whose tokenizer and chat template count: --model.")
    else:
        values = {"model": model, "data": {"path": file}}
    recipe = with_labels(make_recipe(values, _data_options(options)))
    tokenizer = load_tokenizer(recipe.model)
    return recipe, Reader(recipe.data, tokenizer, None, task=recipe.task)


def _data_options(options: Sequence[str] | None) -> list[str]:
    """``train=last`` as the override ``data.train=last``."""
    return [f"data.{option}" for option in options or []]
