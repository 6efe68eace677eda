"""``trimtab compare``: runs side by side, on the terminal and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import typer

PAGE = Path("compare.html")


def compare(
    runs: list[Path] = typer.Argument(..., metavar="RUN RUN...", help="Folders of runs."),
    out: Path = typer.Option(
        None, "--out", "-o", help="Where the page goes. [default: compare.html; none with --json]"
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the numbers as JSON."),
) -> None:
    """Compare runs: one table, and one page with their curves over each other."""
    from trimtab.train.compare import Comparison

    comparison = Comparison.of(runs)
    if as_json:
        typer.echo(json.dumps(comparison.numbers(), indent=1, allow_nan=False))
        if out is not None:
            comparison.write(out)
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table()
    table.add_column("")
    for name in comparison.names:
        table.add_column(Text(name), overflow="fold")
    for row in comparison.rows:
        table.add_row(row.name, *map(Text, row.cells))
    if comparison.differences:
        table.add_section()
    for row in comparison.differences:
        table.add_row(Text(row.name, style="dim"), *map(Text, row.cells))
    console.print(table)
    for warning in comparison.warnings:
        console.print(Text(f"careful: {warning}", style="yellow"))
    console.print(f"page: {comparison.write(out or PAGE)}", style="green", soft_wrap=True)
