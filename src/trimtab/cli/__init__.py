"""The command ``trimtab``. Starting it, and asking for help, imports neither torch nor transformers.

What goes wrong in a way that a person can mend is one line on stderr and exit code 2; anything else keeps
its traceback.
"""

from __future__ import annotations

import sys

import typer

from trimtab.cli import (
    chat,
    compare,
    data,
    eval,
    export,
    generate,
    inspect,
    merge,
    methods,
    plan,
    recipe,
    sweep,
    train,
)
from trimtab.errors import TrimtabError

app = typer.Typer(
    help="One frozen model, a thousand small adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train.train)
app.command("sweep")(sweep.sweep)
app.command("plan")(plan.plan)
app.command("eval")(eval.evaluate)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")
app.add_typer(methods.app, name="methods")


def _print_version(wanted: bool) -> None:
    if wanted:
        from trimtab import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and exit.",
        is_eager=True,
        callback=_print_version,
    ),
) -> None:
    """Options that stand before a command."""


def main() -> None:
    """Run the command line."""
    try:
        app()
    except TrimtabError as error:
        typer.echo(f"trimtab: {error}", err=True)
        sys.exit(2)
