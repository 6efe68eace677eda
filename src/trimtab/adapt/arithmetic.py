"""Arithmetic on adapters as values: scale, add (concatenate), interpolate. No model is needed.

    scaled(a, w)            its edits are w times a's
    add([a, b], name)       its edits are a's plus b's, exactly (LoRA: ranks are concatenated)
    interpolate(a, b, t)    (1 − t) · a + t · b

A method says how its tensors do it; where its edit is not linear in them, the error says why. Weight 1 is
the identity for every method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from trimtab.adapt.adapter import Adapter, Origin, SiteSpec, TensorName
from trimtab.adapt.contract import Method, Params, Place, exactly
from trimtab.adapt.in_peft import TIED
from trimtab.adapt.parse import method_from
from trimtab.errors import BaseMismatchError, ConfigError, UnsupportedError


def scaled(adapter: Adapter, weight: float, *, name: str | None = None) -> Adapter:
    """An adapter whose edits are ``weight`` times this one's.

    Raises:
        ConfigError: the weight is not a finite number.
        UnsupportedError: the method's edit is not linear in its tensors.
    """
    if not math.isfinite(weight):
        raise ConfigError(f"an adapter's weight must be a finite number, not {weight!r}.")
    adapter.check_whole("scale or add")
    result = adapter.detached(name=name)
    if weight == 1:
        return result
    _no_shared(adapter)
    tensors: dict[TensorName, Tensor] = {}
    for site in result.sites:
        if site.role == TIED:
            continue
        method = result.methods[site.method].at(site.path)
        params, slots = _params(result, site)
        new = method.scaled(params, weight, site.role)
        tensors |= {TensorName(site.path, slots[short]): tensor for short, tensor in new.items()}
    return Adapter(
        result.name, result.method, result.sites, tensors, base=result.base, origin=result.origin
    )


def add(
    adapters: Sequence[Adapter], *, name: str, weights: Sequence[float] | None = None
) -> Adapter:
    """An adapter whose edits are the weighted sum of theirs.

    Raises:
        ConfigError: different methods, or not one weight per adapter.
        BaseMismatchError: made for different bases.
        UnsupportedError: the methods have no exact sum.
    """
    if not adapters or (weights is not None and len(weights) != len(adapters)):
        raise ConfigError(
            f"add needs adapters and one weight each; got {len(adapters)} and {weights}."
        )
    parts = [scaled(a, w) for a, w in zip(adapters, weights or [1.0] * len(adapters), strict=True)]
    first = parts[0]
    if len(parts) == 1:
        return first.detached(name=name)
    for other in parts[1:]:
        _compatible(first, other)
    for part in parts:
        _no_shared(part)
    sites: dict[SiteSpec, list[Adapter]] = {}
    for part in parts:
        for site in part.sites:
            sites.setdefault(site, []).append(part)
    alike = all(len(holders) == len(parts) for holders in sites.values())
    tensors: dict[TensorName, Tensor] = {}
    methods_at: list[dict[str, Method]] = [{} for _ in first.methods]
    for site, holders in sites.items():
        if site.role == TIED:
            continue
        given = [(a.methods[site.method].at(site.path), _params(a, site)[0]) for a in holders]
        slots = {short: slot for a in holders for short, slot in _params(a, site)[1].items()}
        method, params = given[0][0].sum(given, site.role)
        places = [Place(other.path, other.role) for other in sites if other.method == site.method]
        methods_at[site.method][site.path] = method if alike else method.aimed(places)
        tensors |= {
            TensorName(site.path, slots[short]): tensor.clone() for short, tensor in params.items()
        }
    method = method_from([_one_method(of_part) for of_part in methods_at])
    return Adapter(
        name,
        method,
        list(sites),
        tensors,
        base=first.base,
        origin=_origin(parts, alike, plain=method.kind != first.method.kind),
    )


def interpolate(a: Adapter, b: Adapter, t: float, *, name: str) -> Adapter:
    """``(1 − t) · a + t · b``."""
    return add([a, b], name=name, weights=[1 - t, t])


def _origin(parts: Sequence[Adapter], alike: bool, *, plain: bool) -> Origin:
    """Of the same base as its parts; PEFT is told of the targets of all. ``plain``: it is of their plain form."""
    origins = [part.origin for part in parts]
    first = origins[0]
    return replace(
        first,
        suffixes=first.suffixes if alike else None,
        in_peft=all(o.in_peft or (plain and bool(o.plain_in_peft)) for o in origins),
        provenance={"sum_of": [part.name for part in parts]},
    )


def _one_method(methods_at: Mapping[str, Method]) -> Method:
    """One method for all sites: the most common one, with patterns where a site's rank differs."""
    found = list(methods_at.values())
    common = max(found, key=found.count)
    different = {path: method for path, method in methods_at.items() if method != common}
    if not different:
        return common
    fields = {name for m in different.values() for name, value in m if value != dict(common)[name]}
    patterned = {"rank": "rank_pattern", "alpha": "alpha_pattern", "count": "count_pattern"}
    if not fields <= patterned.keys():
        raise UnsupportedError(
            f"{common.kind}: the parts differ in {', '.join(sorted(fields))} from site to site."
        )
    changes = {
        patterned[field]: {
            exactly(path, methods_at): dict(method)[field] for path, method in different.items()
        }
        for field in fields
    }
    return common.replace(**changes)


def _params(adapter: Adapter, site: SiteSpec) -> tuple[Params, dict[str, str]]:
    """(tensors by short name, slot of each short name) at a site."""
    at_site = adapter.at_site(site.path)
    names = adapter.methods[site.method].names
    found = {names[slot]: slot for slot in at_site if slot in names}
    return {short: at_site[slot] for short, slot in found.items()}, found


def _compatible(a: Adapter, b: Adapter) -> None:
    kinds = [" | ".join(part.kind for part in adapter.method.members) for adapter in (a, b)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"only adapters of one and the same method can be added, not {kinds[0]} and {kinds[1]}."
        )
    if any(len(adapter.methods) > len(adapter.method.members) for adapter in (a, b)):
        raise UnsupportedError(
            f"{a.name!r} and {b.name!r} cannot be added: a module trained in full replaces its frozen one, and two "
            "replacements have no sum."
        )
    if a.base is not None and b.base is not None and (reason := a.base.mismatch(b.base)):
        raise BaseMismatchError(
            f"{a.name!r} and {b.name!r} were made for different bases: {reason}."
        )


def _no_shared(adapter: Adapter) -> None:
    if any(not name.path for name in adapter.named()):
        raise UnsupportedError(
            f"{adapter.method.kind} has tensors of the whole adapter, whose effect is not a sum over sites."
        )
