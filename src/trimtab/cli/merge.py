"""``trimtab merge``: a base and an adapter as one ordinary model folder."""

from __future__ import annotations

from pathlib import Path

import typer

from trimtab.errors import ConfigError, StorageError


def merge(
    model: str = typer.Argument(..., help="Folder, hub id or .gguf of the base."),
    adapter: str = typer.Argument(..., help="Adapter folder."),
    out: Path = typer.Argument(..., help="Folder of the merged model; it must not exist."),
    dtype: str = typer.Option(
        None, "--dtype", help="Of the merged weights; by default that of the base's files."
    ),
) -> None:
    """Merge an adapter into a copy of its base."""
    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not.")

    from trimtab.adapt.adapter import Adapter
    from trimtab.adapt.attach import attach
    from trimtab.adapt.merge import fold
    from trimtab.models.load import load, stored_dtype

    saved = Adapter.load(adapter)
    base = load(model, dtype=dtype or stored_dtype(model))
    name = attach(base.model, saved, trainable=False).name
    merged = fold(base.model, name)
    temporary = out.with_name(f".{out.name}.part")
    try:
        merged.save_pretrained(temporary)  # type: ignore[operator]
        base.tokenizer.save_pretrained(temporary)
        temporary.rename(out)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {error}; the base and the adapter are untouched."
        ) from error
    typer.echo(f"merged {name} into {base.name}: {out}")
