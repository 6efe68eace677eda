"""Selectors: how sites are named.

A selector is a role (``all-linear``, ``attention``, ``mlp``, ``keys``, ``head``, …), a name that ends a path on
whole segments (``q_proj``, ``self_attn.q_proj``), a glob (``model.layers.*.mlp.*``), or ``re:`` and a regular
expression over the whole path. Each selector must match something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.errors import TargetError, suggest
from trimtab.models.families import ROLES
from trimtab.models.globs import glob_match

if TYPE_CHECKING:
    from trimtab.models.anatomy import Anatomy


def selected(
    anatomy: Anatomy,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> list[str]:
    """Paths matched by the selectors, in model order.

    Raises:
        TargetError: a selector, an exclusion or a layer index that matches nothing.
    """
    chosen: dict[str, None] = {}
    for selector in _listed(targets):
        chosen.update(dict.fromkeys(_matches(anatomy, selector)))
    if not chosen:
        raise TargetError("no targets: name at least one module, glob, regular expression or role.")
    dropped: set[str] = set()
    for selector in _listed(exclude):
        matched = chosen.keys() & _matches(anatomy, selector)
        if not matched:
            raise TargetError(
                f"exclude {selector!r} excludes none of the selected modules; remove or correct it."
            )
        dropped |= matched
    paths = [path for path in chosen if path not in dropped]
    if layers is not None:
        paths = _in_layers(anatomy, paths, layers)
    if not paths:
        raise TargetError("the exclusions leave no module to adapt.")
    return anatomy.ordered(paths)


def _matches(anatomy: Anatomy, selector: str) -> list[str]:
    if selector in ROLES and (found := anatomy.role(selector)):
        return found
    pool = [*(path for path in anatomy.modules if path), *anatomy.parameters, *anatomy.aliases]
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector[3:])
        except re.error as error:
            raise TargetError(
                f"target {selector!r} is not a regular expression: {error}."
            ) from None
        found = [path for path in pool if pattern.fullmatch(path)]
    elif any(char in selector for char in "*?["):
        found = [path for path in pool if glob_match(selector, path)]
    else:
        found = [path for path in pool if path == selector or path.endswith(f".{selector}")]
    if not found and selector in ROLES:
        raise TargetError(
            f"target {selector!r}: {type(anatomy.root).__name__} has no module in that role. "
            "Name modules, a glob or 're:' and a regular expression instead."
        )
    if not found:
        names = (
            {".".join(path.split(".")[-k:]) for path in pool for k in (1, 2)}
            | set(pool)
            | set(ROLES)
        )
        hint = suggest(selector, [name for name in names if not name.isdigit()])
        raise TargetError(
            f"target {selector!r} matches no module of {type(anatomy.root).__name__}.{hint}"
        )
    return [anatomy.aliases.get(path, path) for path in found]


def _in_layers(anatomy: Anatomy, paths: Sequence[str], layers: Sequence[int]) -> list[str]:
    count = len(anatomy.blocks)
    if not count:
        raise TargetError(
            f"layers {list(layers)}: {type(anatomy.root).__name__} has no transformer blocks that Trimtab knows."
        )
    wrong = [index for index in layers if not -count <= index < count]
    if wrong:
        raise TargetError(
            f"layers {wrong} do not exist: {type(anatomy.root).__name__} has blocks 0 to {count - 1}."
        )
    wanted = {index % count for index in layers}
    kept = [path for path in paths if anatomy.block_of(path) in wanted]
    if not kept:
        raise TargetError(f"no selected module lies in layers {sorted(wanted)}.")
    return kept


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
