"""Adapter folders named on the command line, attached to one base under names that do not clash."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.models.load import Base

RESERVED = ("none", "base")
"""Words that stand for the bare base."""


def read_adapters(folders: Sequence[str]) -> dict[str, Adapter]:
    """Adapters by the name they are to have, in the order given. A run's folder stands for its adapter.

    An adapter keeps its own name where that is free; else it gets that of its folder, or of its run.

    Raises:
        FileFormatError: not an adapter folder.
    """
    from trimtab.adapt.adapter import Adapter

    found: dict[str, Adapter] = {}
    for folder in map(Path, folders):
        inner = folder / "adapter"
        place = (
            inner if not (folder / "adapter_config.json").exists() and inner.is_dir() else folder
        )
        adapter = Adapter.load(place)
        found[_free(adapter.name, place, [*found, *RESERVED])] = adapter
    return found


def attach_adapters(base: Base, adapters: dict[str, Adapter]) -> list[str]:
    """Attach them, frozen, under their names. What there is to know of that goes to standard error."""
    from trimtab.adapt.attach import attach

    names = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        for name, one in adapters.items():
            names.append(attach(base.model, one, name, trainable=False).name)
    for warning in told:
        typer.echo(f"careful: {warning.message}", err=True)
    return names


def _free(name: str, folder: Path, taken: Sequence[str]) -> str:
    if name not in taken:
        return name
    resolved = folder.resolve()
    stem = resolved.parent.name if resolved.name == "adapter" else resolved.name
    stem = re.sub(r"[^\w-]+", "-", stem).strip("-") or name
    if stem not in taken:
        return stem
    return next(new for n in range(2, 10**6) if (new := f"{stem}-{n}") not in taken)
