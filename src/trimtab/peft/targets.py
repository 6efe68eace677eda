"""Where an adapter acts: PEFT's ways to name modules, resolved on one model to what Trimtab's selectors say.

PEFT's rules are kept: a list names modules by the end of their paths, a text is a regular expression over whole
paths, ``"all-linear"`` is every linear layer but the output embedding (and the head of a sequence classifier),
``exclude_modules`` and ``modules_to_save`` go before targets, and ``layers_to_transform`` counts by the first number
in a path. Not kept is its silence: each name has to match something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.adapt.contract import Method
from trimtab.adapt.lowrank import LowRank
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import ConfigError, TargetError, suggest
from trimtab.models.anatomy import Anatomy
from trimtab.models.families import ROLES
from trimtab.peft.types import TaskType

ALL_LINEAR = "all-linear"
_HEADS = ("classifier", "score")

Names = str | Sequence[str] | None


@dataclass(frozen=True)
class Where:
    """What a configuration says of where it acts. ``lenient`` targets may lack in this model (defaults do)."""

    targets: Names
    exclude: Names = None
    layers: Sequence[int] | int | None = None
    pattern: Names = None
    parameters: Sequence[str] = ()
    full: Sequence[str] = ()
    task: str | None = None
    lenient: bool = False


def aimed(method: Method, where: Where, model: nn.Module) -> Method:
    """The method at those places of a model.

    Raises:
        TargetError: a name, an exclusion or a layer that matches nothing.
    """
    anatomy = anatomy_of(model)
    targets = _targets(anatomy, where)
    chosen = anatomy.select(targets)
    if where.layers is not None and where.layers != []:
        chosen = _in_layers(anatomy, chosen, where)
        targets = tuple(chosen)
    exclude = _exclude(anatomy, where, chosen)
    if isinstance(method, LowRank):
        method = method.opening(set(anatomy.opened.values()) & set(chosen))
    return method.replace(targets=targets, exclude=exclude, layers=None)


def _targets(anatomy: Anatomy, where: Where) -> str | tuple[str, ...]:
    """Our selectors of what is named, modules and parameters."""
    given, parameters = where.targets, _parameters(anatomy, where.parameters)
    if isinstance(given, str):
        whole = given.lower() == ALL_LINEAR
        found = _all_linear(anatomy, where.task) if whole else (_regular(anatomy, given),)
        return (*found, *parameters) if parameters or len(found) > 1 else found[0]
    names = sorted(given or ())
    if where.lenient:
        names = [name for name in names if _matched(anatomy, name) or _role(anatomy, name)]
    return (*(_name(anatomy, name) for name in names), *parameters)


def _regular(anatomy: Anatomy, text: str) -> str:
    """A text is a regular expression; but a role that no module is called by may be named so, too."""
    return text if text in ROLES and not _matched(anatomy, text) else f"re:{text}"


def _name(anatomy: Anatomy, name: str) -> str:
    """A name; one that is a role too means the modules of that name, where there are such layers."""
    if name in ROLES and any(anatomy.weighted(path) for path in _matched(anatomy, name)):
        return rf"re:(?:.*\.)?{re.escape(name)}"
    return name


def _role(anatomy: Anatomy, name: str) -> bool:
    """Whether a name is a role that some module has."""
    return name in ROLES and bool(anatomy.role(name))


def _matched(anatomy: Anatomy, name: str) -> list[str]:
    """Paths of modules that end with a name."""
    return [path for path in anatomy.modules if path == name or path.endswith(f".{name}")]


def _all_linear(anatomy: Anatomy, task: str | None) -> tuple[str, ...]:
    """Every linear layer but the output embedding; experts' parameters are named one by one, in target_parameters."""
    root = anatomy.root
    get = getattr(root, "get_output_embeddings", None)
    last = get() if get is not None else None
    without = [
        path for path, module in anatomy.modules.items() if last is not None and module is last
    ]
    if last is None and task == TaskType.SEQ_CLS:
        without = [name for name in _HEADS if name in anatomy.modules][:1]
    known = [path for path in anatomy.linears if path not in anatomy.experts]
    heads = [p for p in anatomy.head if anatomy.layer(p).kind == "linear" and p not in without]
    if not heads and not anatomy.experts and not set(without) & set(known):
        return (ALL_LINEAR,)
    return tuple(anatomy.ordered({*known, *heads} - set(without)))


def _parameters(anatomy: Anatomy, names: Sequence[str]) -> tuple[str, ...]:
    """Names of 3-D parameters of experts."""
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in anatomy.experts):
            ends = {
                path.rpartition(".")[0].rpartition(".")[2] + "." + path.rpartition(".")[2]
                for path in anatomy.experts
            }
            there = f" There are: {', '.join(sorted(ends))}." if ends else " It has none."
            raise TargetError(
                f"target_parameters: {name!r} is not a parameter of experts (three dimensions) of "
                f"{type(anatomy.root).__name__}.{suggest(name, ends) or there}"
            )
    return tuple(names)


def _in_layers(anatomy: Anatomy, chosen: Sequence[str], where: Where) -> list[str]:
    """Those in layers of these numbers: of the first number in a path, or of the one behind ``layers_pattern``.

    A module that is named by its whole path is not asked for its layer.
    """
    given = where.layers
    wanted = {given} if isinstance(given, int) else set(given or ())
    patterns = [where.pattern] if isinstance(where.pattern, str) else list(where.pattern or ())
    whole = set() if isinstance(where.targets, str) else set(where.targets or ())
    ends = {path: f"{path}." if path in anatomy.blocks else path for path in chosen}
    numbers = {path: _layer(end, patterns) for path, end in ends.items()}
    missing = wanted - set(numbers.values())
    if missing:
        there = sorted({number for number in numbers.values() if number is not None})
        behind = f" behind {patterns}" if patterns else ""
        raise TargetError(
            f"layers_to_transform: no target lies in layers {sorted(missing)}{behind}; targets lie in {there}."
        )
    return [path for path in chosen if path in whole or numbers[path] in wanted]


def _layer(path: str, patterns: Sequence[str]) -> int | None:
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    try:
        found = next((match for rule in rules if (match := re.match(rule, path))), None)
    except re.error as error:
        raise ConfigError(f"layers_pattern is not a regular expression: {error}.") from None
    return None if found is None else int(found.group(1))


def _exclude(anatomy: Anatomy, where: Where, chosen: Sequence[str]) -> tuple[str, ...]:
    """Our selectors of what is left out of the targets: exclusions, and what lies inside modules trained in full."""
    given = where.exclude
    named = (
        [f"re:{given}"]
        if isinstance(given, str)
        else [_name(anatomy, n) for n in sorted(given or ())]
    )
    needed = [name for name in named if set(anatomy.select(name)) & set(chosen)]
    full = [rf"(?:.*\.)?{re.escape(name)}(?:\..*)?" for name in where.full]
    inside = [path for path in chosen if any(re.fullmatch(rule, path) for rule in full)]
    return (*needed, *inside)


def matching(anatomy: Anatomy, selectors: str | Sequence[str]) -> list[str]:
    """Paths that selectors match; those that match nothing are passed over."""
    found: list[str] = []
    for selector in [selectors] if isinstance(selectors, str) else selectors:
        with suppress(TargetError):
            found += anatomy.select(selector)
    return anatomy.ordered(set(found))


def says(value: Any, name: str, kind: str) -> None:
    """Refuse what names no modules."""
    several = isinstance(value, list | tuple | set | frozenset)
    if (
        value is None
        or isinstance(value, str)
        or (several and all(isinstance(v, str) for v in value))
    ):
        return
    raise ConfigError(
        f"{kind}: {name} must be a list of names, or a regular expression, not {value!r}."
    )
