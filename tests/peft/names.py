"""Every public name of ``peft``: whether `trimtab.peft` has it, how it differs, or why it is not there.

    python -m tests.peft.names             says which names have no reason, and which reasons no name
    python -m tests.peft.names --write     writes the table into docs/from-peft.md

What is found in the two packages is compared: presence, options of functions, fields of configurations. Reasons are
in ``names.json``: ``lacks`` (a name or a pattern -> why it is not there) and ``differs`` (a name -> how).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import peft
from torch import nn

import trimtab.peft as ours
from tests.laws.methods_page import table

REASONS = Path(__file__).with_name("names.json")
PAGE = Path(__file__).parents[2] / "docs" / "from-peft.md"
BEGIN, END = "<!-- names: made by `python -m tests.peft.names --write` -->", "<!-- names: end -->"
THERE = "✔"
MISSING = object()


class Row(NamedTuple):
    """A name as users write it, and what is to be said of it."""

    name: str
    state: str


class Group(NamedTuple):
    """Names of one place: its title, the names, and how either package gives what one means."""

    title: str
    names: Sequence[str]
    theirs: Callable[[str], Any]
    ours: Callable[[str], Any]


PATHS = (
    "peft.AutoPeftModelForCausalLM", "peft.functional", "peft.helpers.DoraCaching",
    "peft.helpers.MontecloraTrainerMixin",
    "peft.helpers.check_if_peft_model", "peft.helpers.disable_input_dtype_casting",
    "peft.helpers.find_kappa_target_modules", "peft.helpers.rescale_adapter_scale",
    "peft.helpers.update_forward_signature", "peft.helpers.update_generate_signature",
    "peft.helpers.update_signature", "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING",
    "peft.optimizers.create_lorafa_optimizer", "peft.optimizers.create_loraplus_optimizer",
    "peft.optimizers.create_riemannian_optimizer", "peft.peft_model.PeftModel", "peft.tuners.lora.LoraConfig",
    "peft.tuners.lora.LoraLayer", "peft.tuners.lora.LoraModel", "peft.tuners.tuners_utils.BaseTuner",
    "peft.tuners.tuners_utils.BaseTunerLayer", "peft.utils.hotswap.hotswap_adapter",
    "peft.utils.hotswap.prepare_model_for_compiled_hotswap", "peft.utils.merge_utils.dare_linear",
    "peft.utils.merge_utils.dare_ties", "peft.utils.merge_utils.magnitude_prune",
    "peft.utils.merge_utils.task_arithmetic", "peft.utils.merge_utils.ties",
    "peft.utils.save_and_load.get_peft_model_state_dict", "peft.utils.save_and_load.set_peft_model_state_dict",
)  # fmt: skip
"""What users import from inside the package."""


def public(owner: Any) -> list[str]:
    return [name for name in dir(owner) if not name.startswith("_")]


def own(cls: type) -> list[str]:
    """The public names of a class that it does not have from torch."""
    return [name for name in public(cls) if name not in dir(nn.Module)]


def at(root: Any, dotted: str) -> Any:
    """What a path from a package means; `MISSING` where there is nothing."""
    found = root
    for name in dotted.split(".")[1:]:
        inner = getattr(found, name, MISSING)
        if inner is MISSING and inspect.ismodule(found):
            try:
                inner = import_module(f"{found.__name__}.{name}")
            except ImportError:
                return MISSING
        found = inner
        if found is MISSING:
            return MISSING
    return found


def _of(owner: type) -> Callable[[str], Any]:
    """What a class defines; where ours inherits from PEFT's, that does not count."""

    def find(name: str) -> Any:
        for cls in owner.__mro__:
            if name in vars(cls):
                inherited = cls.__module__.startswith("peft.") and not owner.__module__.startswith(
                    "peft."
                )
                return MISSING if inherited else vars(cls)[name]
        return MISSING

    return find


def _in(owner: Any) -> Callable[[str], Any]:
    return lambda name: getattr(owner, name, MISSING)


def groups() -> list[Group]:
    """All places, in the order of the page."""
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import Linear

    utils = [name for name in peft.utils.__all__ if not name.startswith("_")]
    paths: dict[str, tuple[Any, Any]] = {p: (at(peft, p), at(ours, p)) for p in PATHS}
    tuner = _of(import_module("trimtab.peft.tuner").Tuner)

    def own_or_tuners(cls: type) -> Callable[[str], Any]:
        """What a model's class has, or its tuner, of which it is asked."""
        find = _of(cls)
        return lambda name: tuner(name) if find(name) is MISSING else find(name)

    return [
        Group("peft", public(peft), _in(peft), _in(ours)),
        Group("PeftModel", own(peft.PeftModel), _of(peft.PeftModel), own_or_tuners(ours.PeftModel)),
        Group("PeftMixedModel", own(peft.PeftMixedModel), _of(peft.PeftMixedModel), own_or_tuners(ours.PeftMixedModel)),
        Group("model.base_model", own(LoraModel), _of(LoraModel), _in(model().base_model)),
        Group("an adapted layer", own(Linear), _of(Linear), _in(model().get_base_model().get_submodule("0"))),
        Group("peft.utils", utils, _in(peft.utils), lambda name: at(ours, f"peft.utils.{name}")),
        Group("paths", PATHS, lambda p: paths[p][0], lambda p: paths[p][1]),
    ]  # fmt: skip


def model() -> Any:
    """A linear layer with a LoRA."""
    config = ours.LoraConfig(target_modules=["0"])
    return ours.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)


# -- what is said of a name ---------------------------------------------------------------------------


class Reasons:
    """The committed reasons, and which of them were used."""

    def __init__(self) -> None:
        said = json.loads(REASONS.read_text(encoding="utf-8"))
        self.lacks: dict[str, str] = said["lacks"]
        self.differs: dict[str, str] = said["differs"]
        self.used: set[str] = set()
        self.unsaid: list[str] = []

    def lack(self, key: str) -> str:
        """Why a name is not there; exact names go before patterns."""
        exact = [key] if key in self.lacks else []
        for pattern in exact or [p for p in self.lacks if fnmatchcase(key, p)]:
            self.used.add(pattern)
            return f"not there: {self.lacks[pattern]}"
        self.unsaid.append(key)
        return "not there"

    def difference(self, key: str, theirs: Any, mine: Any) -> str:
        said = []
        if key in self.differs:
            self.used.add(key)
            said.append(self.differs[key])
        if gone := _gone(theirs, mine):
            said.append(f"without {', '.join(f'`{name}`' for name in gone)}")
        return f"differs: {'; '.join(said)}" if said else THERE

    @property
    def unused(self) -> list[str]:
        return sorted({*self.lacks, *self.differs} - self.used)


def _gone(theirs: Any, mine: Any) -> list[str]:
    """Options of a function of PEFT's that ours has not."""
    first, second = (
        each.__func__ if isinstance(each, classmethod | staticmethod) else each
        for each in (theirs, mine)
    )
    if not (inspect.isroutine(first) and inspect.isroutine(second)):
        return []
    takes = inspect.signature(second).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in takes):
        return []
    named = {p.name for p in takes}
    loose = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        p.name
        for p in inspect.signature(first).parameters.values()
        if p.kind not in loose and p.name not in {*named, "self"}
    ]


def rows(group: Group, reasons: Reasons) -> Iterator[Row]:
    """What is to be said of each name of a place."""
    for name in group.names:
        key = name if group.title == "paths" else f"{group.title}.{name}"
        mine = group.ours(name)
        state = (
            reasons.lack(key)
            if mine is MISSING
            else reasons.difference(key, group.theirs(name), mine)
        )
        yield Row(name, state)


def configs() -> list[list[str]]:
    """Configurations that both packages have, with the options that only one of them has."""
    found = []
    for name in public(peft):
        theirs, mine = getattr(peft, name), getattr(ours, name, None)
        if mine is None or not (isinstance(theirs, type) and issubclass(theirs, peft.PeftConfig)):
            continue
        options = [{f.name: f for f in dataclasses.fields(cls)} for cls in (theirs, mine)]
        only = [sorted(options[a].keys() - options[b].keys()) for a, b in ((0, 1), (1, 0))]
        fixed = sorted(set(mine.lacks) & options[0].keys())
        cells = [", ".join(f"`{option}`" for option in each) for each in (*only, fixed)]
        found.append([f"`{name}`", str(len(options[0])), *cells])
    return found


# -- the page -----------------------------------------------------------------------------------------


def together(found: Iterable[Row]) -> list[list[str]]:
    """One line for each thing that is said, with the names that it is said of."""
    whom: dict[str, list[str]] = {}
    for row in found:
        whom.setdefault(row.state, []).append(f"`{row.name}`")
    order = sorted(whom, key=lambda state: (state != THERE, state))
    return [[", ".join(whom[state]), state] for state in order]


@cache
def written() -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(the tables, names without a reason, reasons without a name)."""
    reasons = Reasons()
    parts = []
    for group in groups():
        found = list(rows(group, reasons))
        there = sum(not row.state.startswith("not there") for row in found)
        title = (
            f"`{group.title}`"
            if " " not in group.title and group.title != "paths"
            else group.title.capitalize()
        )
        parts += [
            f"### {title}: {there} of {len(found)} names",
            table(["names", ""], together(found)),
        ]
    head = ["configuration", "options", "not there", "ours only", "at the default only"]
    parts += ["### Options of configurations", table(head, configs())]
    more = sorted(f"`{name}`" for name in set(ours.__all__) - set(public(peft)))
    parts += ["### What PEFT lacks", f"{', '.join(more)}."]
    return "\n\n".join(parts), tuple(reasons.unsaid), tuple(reasons.unused)


def page(text: str, tables: str) -> str:
    """The page with these tables in their place."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="Write the tables into docs/from-peft.md."
    )
    options = parser.parse_args()
    tables, unsaid, unused = written()
    for name in unsaid:
        print(f"{name} is not there, and nothing says why")  # noqa: T201
    for name in unused:
        print(f"{name} has a reason and is as in PEFT, or no such name is there")  # noqa: T201
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
