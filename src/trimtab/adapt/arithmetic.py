"""Arithmetic on adapters as values: scale, add (concatenate), interpolate. No model is needed.

    scaled(a, w)            its edits are w times a's
    add([a, b], name)       its edits are a's plus b's, exactly (LoRA: ranks are concatenated)
    interpolate(a, b, t)    (1 − t) · a + t · b

A method says how its tensors do it; where its edit is not linear in them, the error says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from trimtab.adapt.adapter import Adapter, SiteSpec, TensorName
from trimtab.adapt.contract import Method, Params
from trimtab.errors import BaseMismatchError, ConfigError, UnsupportedError


def scaled(adapter: Adapter, weight: float, *, name: str | None = None) -> Adapter:
    """An adapter whose edits are ``weight`` times this one's."""
    tensors: dict[TensorName, Tensor] = {}
    for site in adapter.sites:
        method = adapter.methods[site.method].at(site.path)
        params, slots = _params(adapter, site)
        new = method.scaled(params, weight, site.role)
        tensors |= {
            TensorName(site.path, slots[short]): tensor.detach().clone()
            for short, tensor in new.items()
        }
    _no_shared(adapter)
    return Adapter(
        name or adapter.name,
        adapter.methods,
        adapter.sites,
        tensors,
        base=adapter.base,
        origin=adapter.origin,
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
    parts = (
        list(adapters)
        if weights is None
        else [scaled(a, w) for a, w in zip(adapters, weights, strict=True)]
    )
    first = parts[0]
    for other in parts[1:]:
        _compatible(first, other)
    if len(parts) == 1:
        return first.detached(name=name)
    for part in parts:
        _no_shared(part)
    sites: dict[tuple[str, str], list[tuple[Adapter, SiteSpec]]] = {}
    for part in parts:
        for site in part.sites:
            sites.setdefault((site.path, site.role), []).append((part, site))
    tensors: dict[TensorName, Tensor] = {}
    methods_at: dict[str, Method] = {}
    for (path, role), holders in sites.items():
        given = [(a.methods[s.method].at(path), _params(a, s)[0]) for a, s in holders]
        slots = _params(*holders[0])[1]
        method, params = given[0][0].sum(given, role)
        methods_at[path] = method
        tensors |= {
            TensorName(path, slots[short]): tensor.detach().clone()
            for short, tensor in params.items()
        }
    specs = [SiteSpec(path, role, 0) for path, role in sites]
    return Adapter(
        name, [_one_method(methods_at)], specs, tensors, base=first.base, origin=first.origin
    )


def interpolate(a: Adapter, b: Adapter, t: float, *, name: str) -> Adapter:
    """``(1 − t) · a + t · b``."""
    return add([a, b], name=name, weights=[1 - t, t])


def _one_method(methods_at: Mapping[str, Method]) -> Method:
    """One method for all sites: the most common one, with patterns where a site's rank differs."""
    found = list(methods_at.values())
    common = max(found, key=found.count)
    different = {path: method for path, method in methods_at.items() if method != common}
    if not different:
        return common
    fields = {name for m in different.values() for name, value in m if value != dict(common)[name]}
    patterned = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
    if not fields <= patterned.keys():
        raise UnsupportedError(
            f"{common.kind}: the parts differ in {', '.join(sorted(fields))} from site to site."
        )
    changes = {
        patterned[field]: {path: dict(method)[field] for path, method in different.items()}
        for field in fields
    }
    return common.replace(**changes)


def _params(adapter: Adapter, site: SiteSpec) -> tuple[Params, dict[str, str]]:
    """(tensors by short name, slot of each short name) at a site."""
    at_site = adapter.at_site(site.path)
    short_names = adapter.methods[site.method].short_names
    found = {short_names[slot]: slot for slot in at_site if slot in short_names}
    return {short: at_site[slot] for short, slot in found.items()}, found


def _compatible(a: Adapter, b: Adapter) -> None:
    kinds = [method.kind for method in a.methods], [method.kind for method in b.methods]
    if kinds[0] != kinds[1] or len(a.methods) > 1:
        raise ConfigError(
            f"only adapters of one and the same method can be added, not {kinds[0]} and {kinds[1]}."
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
