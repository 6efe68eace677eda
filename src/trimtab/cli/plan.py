"""``trimtab plan``: what a run will need, before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from trimtab.cli import given

TOO_BIG = 1


def plan(
    arguments: list[str] = given.ARGUMENTS,
    model: str = given.MODEL,
    data: str = given.DATA,
    held_out: str = given.HELD_OUT,
    method: str = given.METHOD,
    epochs: int = given.EPOCHS,
    storage: str = given.STORAGE,
    exempt: list[str] = given.EXEMPT,
    average_bits: float = given.AVERAGE_BITS,
    as_json: bool = typer.Option(False, "--json", help="Print numbers only."),
) -> None:
    """Predict trained parameters, tokens, peak memory and time, by taking a few real steps here.

    The exit code is 1 where the run would not fit into memory.
    """
    options = {
        "model": model, "data.path": data, "data.held_out": held_out, "method": method, "epochs": epochs,
        "storage": storage, "exempt": exempt or None, "average_bits": average_bits,
    }  # fmt: skip
    wanted = given.given_recipe(arguments or [], options)

    from trimtab.train.page import sized, timed
    from trimtab.train.plan import plan as predict

    found = predict(wanted)
    if as_json:
        numbers = {name: value for name, value in asdict(found).items() if name != "rows"}
        typer.echo(json.dumps({**numbers, "seconds": found.seconds}, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in found.rows:
            table.add_row(name, Text(value))
        parts = (
            f"training {timed(found.training)}, measuring {timed(found.measuring)}, "
            f"saving {timed(found.saving)}"
        )
        table.add_row("time", f"about {timed(found.seconds)}: {parts}; {found.tokens:,} tokens")
        room = "" if found.available is None else f" of {sized(found.available)}"
        table.add_row("peak memory", f"about {sized(found.peak)}{room}")
        Console(highlight=False).print(table)
    if not found.fits:
        typer.echo("The run does not fit: lower batch.micro_tokens or data.max_tokens.", err=True)
        raise typer.Exit(TOO_BIG)
