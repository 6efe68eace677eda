"""``trimtab merge``: a base and an adapter as one ordinary model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimtab.cli.bases import EXEMPT, STORAGE, open_base
from trimtab.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.models.load import Base

SEEN = 256
"""Tokens of text on which the outputs are compared."""


def merge(
    model: str = typer.Argument(..., help="Folder, hub id or .gguf of the base."),
    adapter: str = typer.Argument(..., help="Adapter folder, or a run's."),
    out: Path = typer.Argument(..., help="Folder of the merged model; it must not exist."),
    dtype: str = typer.Option(
        None, "--dtype", help="Of the merged weights; by default that of the base's files."
    ),
    into: str = typer.Option(
        "dense",
        "--into",
        help="How the merged weights are stored: dense, base (each as the base's is), or a format as for --storage.",
    ),
    tolerance: float = typer.Option(
        None, "--tolerance", help="Largest share of what the adapter does that may be lost. [0.5]"
    ),
    force: bool = typer.Option(False, "--force", help="Write it, however much is lost."),
    storage: str = STORAGE,
    exempt: list[str] = EXEMPT,
) -> None:
    """Merge an adapter into a copy of its base, and tell what storing the result costs."""
    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not.")

    from trimtab.adapt.merge_report import TOLERANCE, check_storage, fold_with_report
    from trimtab.cli.adapters import attach_adapters, read_adapters
    from trimtab.models.load import named_dtype, stored_dtype
    from trimtab.models.saved import save_base

    check_storage(into)
    saved = read_adapters([adapter])
    base = open_base(model, saved.values(), storage, exempt, dtype=stored_dtype(model) or dtype)
    (name,) = attach_adapters(base, saved)
    merged = fold_with_report(
        base.model,
        name,
        dtype=None if dtype is None else named_dtype(dtype, base.model.device),
        storage=into,
        batch=_text(base, name),
        tolerance=TOLERANCE if tolerance is None else tolerance,
        force=force,
    )
    temporary = out.with_name(f".{out.name}.part")
    try:
        save_base(base.model, temporary)
        base.tokenizer.save_pretrained(temporary)
        temporary.rename(out)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {error}; the base and the adapter are untouched."
        ) from error
    typer.echo(f"merged {name} into {base.name}: {out}")
    for line in merged.lines():
        typer.echo(f"  {line}")


def _text(base: Base, name: str) -> dict[str, Tensor]:
    """A text that has nothing to do with the adapter, as one call of the model."""
    import torch

    from trimtab.engine import Engine
    from trimtab.evals import general_text

    most = min(SEEN, Engine(base).context(name) or SEEN)
    ids = base.tokenizer(general_text(), verbose=False)["input_ids"][:most]
    return {"input_ids": torch.tensor([ids], device=base.model.device)}
