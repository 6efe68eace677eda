"""``trimtab methods``: every method there is, and all about one; read from the methods themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.adapt.about import About

app = typer.Typer(help="Every fine-tuning method, and all about one.")
AS_JSON = typer.Option(False, "--json", help="Print the facts as JSON.")


@app.callback(invoke_without_command=True)
def methods(context: typer.Context, as_json: bool = AS_JSON) -> None:
    """List the methods: what each does, whether it merges into a weight, its learning rate, PEFT's name."""
    if context.invoked_subcommand is not None:
        return
    from trimtab.adapt.about import about, presets
    from trimtab.adapt.parse import methods as registry

    found = [about(name) for name in registry.names()]
    if as_json:
        listed = [_brief(facts) for facts in found]
        typer.echo(_json({"methods": listed, "presets": dict(presets())}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table()
    for head in ("method", "what it does", "merges", "rate", "in PEFT"):
        table.add_column(head, overflow="fold")
    for facts in found:
        cells = [
            facts.purpose, "yes" if facts.merges else "no", f"{facts.lr:g}", facts.peft or "",
        ]  # fmt: skip
        table.add_row(Text(facts.name, style="bold"), *map(Text, cells))
    console.print(table)
    for name, meaning in presets().items():
        console.print(Text(f"{name} is {meaning}"))
    console.print("One of them: trimtab methods show NAME", style="dim")


@app.command("show")
def show(
    name: str = typer.Argument(..., help="A method, with options if you like: 'lora(rank=8)'."),
    model: Path = typer.Option(
        None, "--model", "-m", help="Folder or config.json of a model: sites and parameters on it."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Show a method: mathematics, source, options and defaults, and its size on a model (without weights)."""
    from trimtab.adapt.about import about, presets
    from trimtab.adapt.parse import method_from
    from trimtab.adapt.parse import methods as registry

    known = name in registry.names()  # or with options, or a preset, or a union
    facts = about(name if known else method_from(name).kind, first_values=model is None)
    size = None if model is None else _size(name, model)
    if as_json:
        values = size["first_values"] if size else dict(facts.first_values)
        sheet = {**_brief(facts), "options": _options(facts), "first_values": values}
        typer.echo(_json({**sheet, **({} if size is None else {"size": size})}))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in _tables(facts, size, presets().get(name)):
        console.print(table)


def _size(text: str, model: Path) -> dict[str, Any]:
    """Where a method acts on the model of a config, and how much it trains."""
    from trimtab.adapt.about import first_values_of
    from trimtab.adapt.describe import counted, grouped, states
    from trimtab.adapt.parse import method_from
    from trimtab.models.skeleton import skeleton

    built, method = skeleton(model), method_from(text)
    adapter, specs = states(built, method)
    base = sum(parameter.numel() for parameter in built.parameters())
    count = counted(adapter, specs)
    return {
        "method": method.to_dict(),
        "model": str(model),
        "base_parameters": base,
        "parameters": count,
        "share": count / base,
        "sites": len(adapter.sites),
        "places": [line.strip() for line in grouped(adapter)],
        "first_values": first_values_of(built, method),
    }


def _tables(facts: About, size: dict[str, Any] | None, preset: str | None) -> list[Table]:
    """A sheet of facts, and one of options."""
    from rich.table import Table
    from rich.text import Text

    values = size["first_values"] if size else facts.first_values
    rows = [
        ("method", f"{facts.title}: {facts.purpose}"),
        ("stands for", preset or ""),
        ("formula", facts.formula),
        ("source", facts.source),
        ("for example", facts.example),
        ("edits", ", ".join(facts.edits)),
        ("merges", facts.merging),
        ("in PEFT", facts.peft or "no"),
        ("rate, decay", f"learning rate {facts.lr:g}, weight decay {facts.weight_decay:g}"),
        ("starts from", "\n".join(f"{slot}: {value}" for slot, value in values.items())),
    ]
    if size is not None:
        whole = f"{size['parameters']:,} of {size['base_parameters']:,} ({size['share']:.3%})"
        rows += [
            ("on", size["model"]),
            ("parameters", whole),
            ("sites", "\n".join([str(size["sites"]), *size["places"]])),
        ]
    sheet = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    sheet.add_column(style="bold")
    sheet.add_column(overflow="fold")
    for head, value in rows:
        if value:
            sheet.add_row(head, Text(value))
    options = Table()
    for head in ("option", "type", "default", ""):
        options.add_column(head, overflow="fold")
    for option in facts.options:
        options.add_row(*map(Text, (option.name, option.kind, option.default, option.text)))
    return [sheet, options]


def _brief(facts: About) -> dict[str, Any]:
    return {
        "name": facts.name, "title": facts.title, "purpose": facts.purpose, "source": facts.source,
        "formula": facts.formula, "example": facts.example, "edits": list(facts.edits), "merges": facts.merges,
        "why_not": facts.why_not, "lr": facts.lr, "weight_decay": facts.weight_decay, "peft": facts.peft,
    }  # fmt: skip


def _options(facts: About) -> list[dict[str, str]]:
    return [
        {"name": o.name, "type": o.kind, "default": o.default, "description": o.text}
        for o in facts.options
    ]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
