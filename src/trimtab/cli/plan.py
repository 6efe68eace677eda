"""``trimtab plan``: what a run will need, before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from trimtab.cli import given

if TYPE_CHECKING:
    from trimtab.train.plan import Plan

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
    gpu: str = typer.Option(
        None, "--gpu", help="Plan for that GPU, by name or memory: 'RTX 4090', 'H100', '24GB'."
    ),
    dry: bool = typer.Option(
        False, "--dry", help="Take no real step here; time comes from a count of operations."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print numbers only."),
) -> None:
    """Predict trained parameters, tokens, peak memory by part, and time, on this machine or a named GPU.

    Memory needs no weights and takes none. Time here is that of a few real steps. Where the run would not fit, settings
    are proposed with which it does, and the exit code is 1.
    """
    options = {
        "model": model, "data.path": data, "data.held_out": held_out, "method": method, "epochs": epochs,
        "storage": storage, "exempt": exempt or None, "average_bits": average_bits,
    }  # fmt: skip
    wanted = given.given_recipe(arguments or [], options)

    from trimtab.train.plan import plan as predict

    found = predict(wanted, gpu, dry=dry)
    if as_json:
        numbers = {name: value for name, value in asdict(found).items() if name != "rows"}
        seconds = None if found.times is None else found.times.total
        more = {"peak": found.peak, "fits": found.fits, "seconds": seconds}
        typer.echo(json.dumps({**numbers, **more}, indent=2))
    else:
        _print(found)
    if not found.fits:
        typer.echo(_advice(found), err=True)
        raise typer.Exit(TOO_BIG)


def _print(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trimtab.train.page import sized

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in found.rows:
        table.add_row(name, Text(value))
    table.add_row("time", Text(_time(found)))
    room = "" if found.available is None else f" of {sized(found.available)}"
    table.add_row(
        "peak memory", f"about {sized(found.peak)}{room} on {found.device}, in {found.phase}"
    )
    parts = ", ".join(f"{name} {sized(size)}" for name, size in found.parts.items() if size)
    table.add_row("", parts)
    Console(highlight=False).print(table)


def _time(found: Plan) -> str:
    from trimtab.train.page import timed

    times = found.times
    if times is None:
        return f"not known: name the GPU to learn it ({found.flops:.2g} operations)"
    parts = [f"training {timed(times.training)}", f"measuring {timed(times.measuring)}"]
    parts += [f"saving {timed(times.saving)}"] if times.saving else []
    return (
        f"about {timed(times.total)}: {', '.join(parts)}; {found.tokens:,} tokens; by {times.how}"
    )


def _advice(found: Plan) -> str:
    from trimtab.train.page import sized

    if found.proposal is None:
        return (
            "The run does not fit, nor does it with checkpointing, small micro-batches, four bits and short examples: "
            "take a smaller model or a larger device."
        )
    return (
        f"The run does not fit. With these overrides it needs about {sized(found.proposal.peak)}:\n"
        f"    {' '.join(found.proposal.overrides)}"
    )
