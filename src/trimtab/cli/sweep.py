"""``trimtab sweep``: variants of a recipe, trained together on one base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trimtab.cli import given
from trimtab.cli.train import INTERRUPTED
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.train.sweep.record import Asked
    from trimtab.train.sweep.summary import SweepSummary


def sweep(
    arguments: list[str] = typer.Argument(
        None,
        metavar="[RECIPE] [a.b=c ...]",
        help="A recipe (YAML), or a sweep's folder; then overrides, of which some are lists or ranges.",
    ),
    model: str = given.MODEL,
    data: str = given.DATA,
    held_out: str = given.HELD_OUT,
    method: str = given.METHOD,
    random: int = typer.Option(
        None, "--random", metavar="N", help="Draw N variants instead of every combination."
    ),
    seed: int = typer.Option(0, "--seed", help="Of what is drawn."),
    sampler: str = typer.Option(
        None, "--sampler", help="Who draws them: random, or optuna, which learns from its rounds."
    ),
    eta: int = typer.Option(
        2, "--eta", help="One of so many goes on after each decision; 1 trains all to the end."
    ),
    first: int = typer.Option(
        1, "--first", metavar="STEPS", help="Fewest steps of a variant before the first decision."
    ),
    together: int = typer.Option(
        None, "--together", metavar="N", help="Train so many at once, in rounds; by default all."
    ),
    out: str = typer.Option(None, "--out", "-o", help="Folder of the sweep."),
    resume: bool = typer.Option(
        False, "--resume", help="Go on with the sweep in that folder, with the same command."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the numbers as JSON only."),
) -> None:
    """Train variants of a recipe together on one copy of the base, stop those that lose, and keep the best.

    trimtab sweep recipe.yaml "optim.lr=[1e-4,3e-4,1e-3]" "method.rank=[8,32]" --out runs/rates

    trimtab sweep recipe.yaml "optim.lr=log(1e-5,1e-2)" "optim.warmup=uniform(0,0.2)" --random 8

    trimtab sweep runs/rates --resume

    A list is what an option takes, one of its values in each variant; a list as a value has brackets of its own. What
    is of the base (model, storage, dtype) and how variants are measured is the same for all. They are judged by their
    loss on held-out data: with --eta 2 the better half goes on after an eighth, a fourth and half of the steps of eight
    variants, and the best of those that reach the end is kept.
    """
    from trimtab.train.sweep.api import sweep_recipe
    from trimtab.train.sweep.config import SweepConfig
    from trimtab.train.sweep.record import Record
    from trimtab.train.sweep.summary import SweepSummary

    arguments = arguments or []
    folder = given.run_folder_of(arguments)
    place: str | None
    if folder is not None:
        if not resume or len(arguments) > 1 or out not in (None, folder):
            raise ConfigError(
                f"{folder} is a folder: to go on with the sweep in it, give --resume and nothing else."
            )
        asked, place = Record.read(Path(folder)).asked, folder
    else:
        config = SweepConfig(
            sampler=sampler or ("grid" if random is None else "random"),
            count=random,
            seed=seed,
            eta=eta,
            first=first,
            together=together,
        )
        options = {"model": model, "data.path": data, "data.held_out": held_out, "method": method}
        asked, named = _asked(arguments, options, config)
        place = out or named
    outcome = sweep_recipe(asked, out=place, resume=resume, quiet=as_json)
    found = SweepSummary.read(outcome.folder)
    if as_json:
        typer.echo(json.dumps(found.numbers(), indent=1, allow_nan=False))
    else:
        _print(found)
    if outcome.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _asked(arguments: list[str], options: dict[str, Any], config: Any) -> tuple[Asked, str | None]:
    """What was typed, and the folder that an override or the recipe names."""
    from trimtab.train.sweep.record import Asked
    from trimtab.train.sweep.space import given_options

    values, overrides, where = given.given_values(arguments, options)
    typed = given_options(overrides)
    named = typed.pop("out", None) or values.pop("out", None)
    return Asked(values, typed, config, where), None if named is None else str(named)


def _print(found: SweepSummary) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table()
    for name in found.header:
        table.add_column(Text(name), overflow="fold")
    for line in found.lines:
        table.add_row(*map(Text, found.cells(line)), style="green" if line.won else "")
    console.print(table)
    if found.winner is not None:
        console.print(Text(f"adapter: {found.folder / 'adapter'}", style="green"), soft_wrap=True)
    console.print(Text(f"report: {found.folder / 'report.html'}", style="green"), soft_wrap=True)
