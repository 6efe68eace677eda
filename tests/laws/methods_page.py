"""``docs/methods.md``: the table of capabilities, and each method in its own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.laws.capabilities import CAPABILITIES, UNMERGED
from trimtab.adapt.about import About, Option, about, presets
from trimtab.adapt.contract import Method
from trimtab.adapt.parse import methods

HEAD = """# Methods

<!-- Made by `python -m tests.laws.capabilities --write`; do not edit. A test compares it with what the methods do. -->

A method is a string, a value or a mapping: `"lora(rank=8)"`, `tt.LoRA(rank=8)`, `{"kind": "lora", "rank": 8}`.
`trimtab methods` lists them, `trimtab methods show NAME --model FOLDER` shows one and its size on a model.

## What works

Found by doing it, on tiny models, for each method: **merge** ≡ forward; a row in a **mixed batch** (other methods,
the bare base) ≡ the row alone; gradients when **trained together** with others in one batch ≡ alone; on a **base that
hides its weights** (any storage that says its sizes and computes) as on a plain one; attached to each kind of layer,
merged there where it merges (**attention**: inside it, or at its output; **sub-layer**: a whole MLP); **PEFT reads**
the folder we save, and we **read** the one that it saves, with equal outputs. "acts": it acts there, but cannot merge
there. Every method is also saved and loaded, disabled and detached (bit for bit), stacked and checkpointed: those laws
([tests/laws](../tests/laws)) have no exceptions.
"""
YES, ACTS, NO = "✔", "acts", "–"


def page(refused: Mapping[str, Mapping[str, str]]) -> str:
    """The whole page, for these refusals."""
    names = methods.names()
    general = about("full").options
    shared = [option for option in general if option.name in Method.model_fields]
    parts = [
        HEAD,
        table(["", *CAPABILITIES], [row(name, refused.get(name, {})) for name in names]),
        "What is refused, and why:",
        "\n".join(reasons(refused)),
        "## Options of every method",
        options(shared),
    ]
    if presets():
        lines = [f"- `{name}` is `{meaning}`" for name, meaning in sorted(presets().items())]
        parts += ["## Settings with a name of their own", "\n".join(lines)]
    parts += ["## The methods", *(section(about(name, first_values=True)) for name in names)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def row(name: str, refused: Mapping[str, str]) -> list[str]:
    marks = [
        NO if cell in refused else ACTS if f"{cell}{UNMERGED}" in refused else YES
        for cell in CAPABILITIES
    ]
    return [f"[{name}](#{name})", *marks]


def reasons(refused: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for each reason: what it forbids, and whom."""
    whom: dict[tuple[str, str], list[str]] = {}
    cells = [name for each in CAPABILITIES for name in (each, f"{each}{UNMERGED}")]
    for method, told in sorted(refused.items()):
        for why in dict.fromkeys(told.values()):
            which = ", ".join(cell for cell in cells if told.get(cell) == why)
            whom.setdefault((which, why.strip().rstrip(".")), []).append(method)
    order = sorted(whom.items(), key=lambda item: cells.index(item[0][0].partition(", ")[0]))
    return [f"- *{which}* ({', '.join(names)}): {why}." for (which, why), names in order]


def section(facts: About) -> str:
    """One method."""
    lines = [f"- {facts.example}", f"- Edits: {', '.join(facts.edits)}. Merges: {facts.merging}."]
    lines.append(f"- Learning rate {facts.lr:g}, weight decay {facts.weight_decay:g}.")
    if facts.first_values:
        starts = "; ".join(f"`{slot}` {value}" for slot, value in facts.first_values.items())
        lines.append(f"- Starts from (on a decoder of width 64): {starts}.")
    if facts.peft:
        lines.append(f"- PEFT calls it `{facts.peft}`.")
    own = [option for option in facts.options if special(option)]
    parts = [
        f"### {facts.name}",
        f"**{facts.title}** ({facts.source}): {facts.purpose}",
        f"```text\n{facts.formula}\n```",
        "\n".join(lines),
        *([options(own)] if own else []),
    ]
    return "\n\n".join(parts)


def special(option: Option) -> bool:
    """Whether an option is the method's own, or has a default of its own."""
    field = Method.model_fields.get(option.name)
    return field is None or option.default != shown_default(option.name)


def shown_default(name: str) -> str:
    return next(option.default for option in about("full").options if option.name == name)


def options(found: Sequence[Option]) -> str:
    rows = [[f"`{o.name}`", f"`{o.kind}`", f"`{o.default}`", o.text] for o in found]
    return table(["option", "type", "default", ""], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
