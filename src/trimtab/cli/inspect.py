"""``trimtab inspect``: what an adapter folder holds. No model is needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import typer


def inspect(
    folder: Path = typer.Argument(..., help="Adapter folder, Trimtab's or PEFT's."),
) -> None:
    """Show an adapter: method, sites, tensors, sizes, base and provenance."""
    from rich.console import Console
    from rich.table import Table

    from trimtab.adapt.adapter import Adapter

    adapter = Adapter.load(folder)
    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(adapter):
        table.add_row(name, value, style=None)
    console.print(table)
    tensors = Table(title=f"{len(adapter.named())} tensors", title_justify="left")
    for head, side in (
        ("slot", "left"),
        ("shape", "left"),
        ("dtype", "left"),
        ("count", "right"),
        ("bytes", "right"),
    ):
        tensors.add_column(head, justify=side)  # type: ignore[arg-type]
    kinds = Counter(
        (name.slot, tuple(t.shape), str(t.dtype)) for name, t in adapter.named().items()
    )
    sizes = {
        (name.slot, tuple(t.shape), str(t.dtype)): t.numel() * t.element_size()
        for name, t in adapter.named().items()
    }
    for kind, count in kinds.items():
        slot, shape, dtype = kind
        shown = "×".join(map(str, shape)) or "scalar"
        tensors.add_row(
            slot, shown, dtype.removeprefix("torch."), str(count), f"{count * sizes[kind]:,}"
        )
    console.print(tensors)


def _facts(adapter: Any) -> list[tuple[str, str]]:
    """What is known beside the tensors."""
    origin = adapter.origin
    sites = Counter(site.path.rpartition(".")[2] for site in adapter.sites)
    rows = [
        ("name", adapter.name),
        *(("method", f"{method.kind} {_options(method)}".strip()) for method in adapter.methods),
        ("sites", f"{len(adapter.sites)}: " + ", ".join(f"{n} × {k}" for k, n in sites.items())),
        ("parameters", f"{adapter.count:,} ({adapter.nbytes / 2**20:.2f} MiB)"),
        ("base", origin.base_name or "not stated"),
    ]
    if adapter.base is not None:
        rows.append(
            ("made for", f"{adapter.base.model_class}, architecture {adapter.base.architecture}")
        )
        if adapter.base.storage is not None:
            exempt = ", ".join(adapter.base.exempt)
            rows.append(
                ("stored in", adapter.base.storage + (f", but for {exempt}" if exempt else ""))
            )
    rows += [
        (key, value)
        for key, value in _flat(origin.provenance)
        if not key.startswith("recipe.method")
    ]
    return rows


def _options(method: Any) -> str:
    options = method.model_dump(exclude_defaults=True, mode="json")
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((f"{prefix}{key}", str(value)))
    return found
