"""The base that a command loads: as it was asked for, or as its adapter knows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.models.load import Base

DENSE = "dense"
STORAGE = typer.Option(
    None,
    "--storage",
    help="Keep the base's linear layers in nf4, fp4, int4, int8, int8-group, fp8, loftq(rank=16), or dense. [default: "
    "as the adapter was trained beside them]",
)
EXEMPT = typer.Option(
    [],
    "--exempt",
    help="Layers to keep dense, or with =int8 in that format: a name, the end of one, or a glob (may be repeated).",
)
AVERAGE_BITS = typer.Option(
    None,
    "--average-bits",
    help="Keep the worst layers of a base in four bits in int8, up to so many bits a weight on average.",
)


def open_base(
    model: str,
    adapters: Iterable[Adapter] = (),
    storage: str | None = None,
    exempt: Sequence[str] = (),
    average_bits: float | None = None,
    **options: Any,
) -> Base:
    """Load a base for adapters. Where nothing is asked for, it is stored as the first of them knows it, and that is
    said on standard error; ``options`` go to `trimtab.load`."""
    from trimtab.models.load import load
    from trimtab.models.storage import can_ask

    asked = storage or exempt or average_bits is not None
    for one in () if asked else adapters:
        if one.base is not None and can_ask(model, one.base.storage, one.base.exempt):
            storage, exempt = one.base.storage, one.base.exempt
            note(
                f"The base is loaded in {storage}, as {one.name!r} was trained beside it; --storage dense loads it "
                "densely."
            )
            break
    base = load(
        model,
        storage=None if storage == DENSE else storage,
        exempt=exempt,
        average_bits=average_bits,
        **options,
    )
    if base.mixed is not None:
        note(str(base.mixed))
    return base


def note(text: str) -> None:
    """Something to know, on standard error."""
    typer.echo(text, err=True)
