"""``trimtab export``: an adapter in the form to share, and in few bits if wanted."""

from __future__ import annotations

from pathlib import Path

import typer

from trimtab.errors import ConfigError


def export(
    adapter: str = typer.Argument(
        ..., help="Adapter folder, Trimtab's or PEFT's, or that of a run."
    ),
    out: Path = typer.Option(..., "--out", help="Folder to write; it must not exist."),
    bits: int = typer.Option(
        None, "--bits", help="8 or 4: store matrices in so many bits. PEFT cannot read that."
    ),
) -> None:
    """Write an adapter without what only training needs, as PEFT and servers read it."""
    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not.")

    from trimtab.adapt.adapter import Adapter
    from trimtab.adapt.export import exported
    from trimtab.adapt.files import WEIGHTS, save
    from trimtab.cli.adapters import read_adapters

    (saved,) = read_adapters([adapter]).values()
    found = exported(saved)
    save(found, out, bits)
    size = (out / WEIGHTS).stat().st_size
    typer.echo(f"{found.name} ({found.method.kind}), {size / 2**20:.2f} MiB: {out}")
    if bits:
        error = Adapter.load(out).origin.provenance["rounded"]["error"]
        typer.echo(f"{bits} bits, off by {error['rms']:.2%} (rms), {error['max']:.2%} at most")
