"""Weighted combinations of adapters, by PEFT's names: sums, and sums of what is left after pruning and voting.

With ΔW_i the change of weight of adapter i and w_i its weight:

    linear, cat               Σ w_i ΔW_i, exactly
    svd                       the nearest to that sum of ``svd_rank``
    magnitude_prune           Σ w_i P(ΔW_i),   P keeps the share ``density`` of the largest entries
    dare_linear               Σ w_i P(ΔW_i),   P keeps entries with probability ``density`` and divides them by it
                              (DARE, arXiv 2311.03099)
    ties, dare_ties           the mean of w_i P(ΔW_i) over the adapters that have the elected sign, entry by entry
                              (TIES, arXiv 2306.01708)

A kind that ends in ``_svd`` does this to ΔW and is the nearest of ``svd_rank``. Without it, and for LoRAs, pruning
is of the factors A and B, as in PEFT. Their pruned products are then added exactly; PEFT adds the factors instead,

    Σ √w_i B_i · Σ √w_j A_j,   in which every B_i meets every A_j,

so its ``linear``, ``magnitude_prune`` and ``dare_linear`` have products that belong to no adapter, and ours have not
(the rank is the sum of the ranks, as in ``cat``).
``ties`` and ``dare_ties`` of factors elect signs entry by entry among factors that have no common order, and so can
only be what they are in PEFT, with those products; ``ties_svd`` and ``dare_ties_svd`` are the methods of the papers.

Methods that are no LoRA are summed exactly where they have a sum of their own (`trimtab.add`), or else by ΔW, as a
LoRA of all the rank that it takes; of ``svd_rank`` for the kinds with ``svd``, which must then be said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, SiteSpec, TensorName
from trimtab.adapt.arithmetic import add
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import Place
from trimtab.adapt.factors import joined
from trimtab.adapt.replaced import Replaced
from trimtab.adapt.site import ExpertsSite, SiteBase
from trimtab.errors import ConfigError, DuplicateNameError, UnsupportedError
from trimtab.methods.lora import LoRA
from trimtab.peft.changes import (
    Change,
    Factors,
    changes,
    decomposed,
    edited,
    edits_at,
    layer_of,
    lora_of,
    whole,
    with_trained,
    without_trained,
)
from trimtab.peft.combination import Combination
from trimtab.peft.config import PeftConfig


def combined(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: Combination,
) -> Adapter:
    """The combination of attached adapters, attached to nothing. Nothing that is attached is changed.

    A module that one of them trains in full comes along as it is.

    Raises:
        ConfigError: options that do not fit the adapters.
        DuplicateNameError: the name is taken.
        UnsupportedError: an adapter has no sum with others and is no change of weights, or two train one module.
    """
    bank = bank_of(model)
    if name in bank.adapters:
        raise DuplicateNameError(
            f"there is an adapter {name!r} already; delete it, or choose another."
        )
    found = [bank.require(adapter) for adapter in adapters]
    if not found or len(weights) != len(found):
        raise ConfigError(
            f"one weight is needed for each adapter; there are {len(found)} adapters and {len(weights)} weights."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights must be finite numbers, not {list(weights)}.")
    result = _exact(model, found, weights, name, how) or _copies(model, found, weights, name, how)
    if result is None and not how.cuts and how.prunes and _factors(model, adapters):
        result = lora_of(model, name, list(_of_factors(model, adapters, weights, how)), found)
    if result is None:
        result = lora_of(model, name, list(_of_changes(model, adapters, weights, how)), found)
    result.base = found[0].base
    return result


# -- sums ---------------------------------------------------------------------------------------------


def _exact(
    model: nn.Module,
    found: Sequence[Adapter],
    weights: Sequence[float],
    name: str,
    how: Combination,
) -> Adapter | None:
    """The sum itself, where that is asked for and the methods have one."""
    bank = bank_of(model)
    chosen = how.rank is not None or how.clamp is not None
    lossy = how.kind.endswith("svd") and _all_lora(found) and len(found) > 1
    if not how.sums and not (len(found) == 1 and how.density == 1):
        return None
    if chosen or lossy or any(_uneven(model, adapter.name) for adapter in found):
        return None
    scaled = [
        w * bank.scales.get(adapter.name, 1.0) for adapter, w in zip(found, weights, strict=True)
    ]
    try:
        total = add([without_trained(adapter) for adapter in found], name=name, weights=scaled)
    except (UnsupportedError, ConfigError):
        return None  # no sum of their own kind: then by their changes of weights
    return with_trained(total, found)


def _uneven(model: nn.Module, name: str) -> bool:
    """Whether an adapter goes farther at one layer than at another."""
    return any(
        edit.scale != 1.0
        for site, path in edited(model, [name])
        for edit in edits_at(site, name, path)
    )


def _all_lora(adapters: Iterable[Adapter]) -> bool:
    return all(isinstance(m, LoRA) for adapter in adapters for m in adapter.method.members)


@torch.no_grad()
def _copies(
    model: nn.Module,
    found: Sequence[Adapter],
    weights: Sequence[float],
    name: str,
    how: Combination,
) -> Adapter | None:
    """Copies of layers (norm tuning, full training): what they add to the frozen ones, in one copy."""
    methods = [adapter.method for adapter in found]
    alike = {method.kind for method in methods} == {methods[0].kind}
    if not alike or not all(isinstance(method, Replaced) for method in methods):
        return None
    if how.rank is not None or how.clamp is not None or (how.cuts and how.kind != "svd"):
        return None
    places: dict[SiteSpec, SiteBase] = {}
    for site, path in edited(model, [adapter.name for adapter in found]):
        places[SiteSpec(path, "", 0)] = site
    if any(isinstance(site, ExpertsSite) for site in places.values()):
        return None
    scales = bank_of(model).scales
    tensors: dict[TensorName, Tensor] = {}
    for spec, site in places.items():
        frozen = layer_of(site, spec.path).stored()
        holders = [(a, w) for a, w in zip(found, weights, strict=True) if a.at_site(spec.path)]
        far = [
            w * scales.get(a.name, 1.0) * edits_at(site, a.name, spec.path)[0].scale
            for a, w in holders
        ]
        for slot in holders[0][0].at_site(spec.path):
            base = frozen[slot.rpartition(".")[2]].float()
            added = [a.at_site(spec.path)[slot].float() - base for a, _ in holders]
            tensors[TensorName(spec.path, slot)] = base + how.combine(added, far)
    same = all(set(adapter.sites) == set(found[0].sites) for adapter in found)
    method = methods[0] if same else methods[0].aimed([Place(spec.path) for spec in places])
    result = Adapter(name, method, list(places), tensors, origin=found[0].origin)
    return with_trained(result, found)


# -- factors ------------------------------------------------------------------------------------------


def _factors(model: nn.Module, adapters: Sequence[str]) -> bool:
    """Whether all that these do is to add B A, so that pruning can be of A and B."""
    edits = [
        edit
        for site, path in edited(model, adapters)
        for name in adapters
        for edit in edits_at(site, name, path)
    ]
    return bool(edits) and all(
        isinstance(edit.method, LoRA)
        and not edit.role
        and not (edit.method.bits or edit.method.rebased or edit.method.invocation)
        and not edit.tensors.keys() & {"A0", "c"}
        for edit in edits
    )


@torch.no_grad()
def _of_factors(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], how: Combination
) -> Iterable[Factors]:
    """Pruned factors of each layer. Each factor gets √|w s|, the sign goes to A, as in PEFT."""
    scales = bank_of(model).scales
    for site, path in edited(model, adapters):
        experts = isinstance(site, ExpertsSite)
        holder = site.get_submodule(path.rpartition(".")[2]) if experts else site.slots
        all_a, all_b, factors, ranks = [], [], [], []
        for name, weight in zip(adapters, weights, strict=True):
            for edit in edits_at(site, name, path):
                params = edit.params(holder, torch.float32)
                all_a.append(params["A"])
                all_b.append(params["B"])
                method = edit.method
                if not isinstance(method, LoRA):
                    raise AssertionError("checked before")
                ranks.append(method.rank)
                factors.append(weight * method.scaling * edit.scale * scales.get(name, 1.0))
        layer = layer_of(site, path)
        of_b = [math.sqrt(abs(factor)) for factor in factors]
        of_a = [math.copysign(root, factor) for root, factor in zip(of_b, factors, strict=True)]
        if how.votes:
            if len(set(ranks)) > 1:
                raise ConfigError(
                    f"{path}: {how.kind} compares factors entry by entry, and these have ranks {ranks}; "
                    f"use {how.kind}_svd, which compares the changes of the weight."
                )
            yield Factors(path, layer, how.combine(all_a, of_a), how.combine(all_b, of_b))
            continue
        left_a = [how.pruned(a) * root for a, root in zip(all_a, of_a, strict=True)]
        left_b = [how.pruned(b) * root for b, root in zip(all_b, of_b, strict=True)]
        yield Factors(path, layer, *joined(list(zip(left_a, left_b, ranks, strict=True))))


# -- changes of weights -------------------------------------------------------------------------------


def _of_changes(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], how: Combination
) -> Iterable[Factors]:
    rank = how.rank or _usual_rank(model, adapters)
    if rank is None and how.cuts:
        raise ConfigError(
            f"{how.kind} makes a LoRA of a rank that these adapters do not tell: say svd_rank=..., up to the smaller "
            "side of the largest layer for all of the change."
        )
    for change in changes(model, adapters):
        yield _lowered(change, [weights[number] for number in change.who], how, rank)


def _usual_rank(model: nn.Module, adapters: Sequence[str]) -> int | None:
    """The largest rank of LoRAs, as in PEFT; other methods have none that says how many are needed."""
    found = [bank_of(model).require(name) for name in adapters]
    if not _all_lora(found):
        return None
    ranks = [
        max([m.rank, *m.rank_pattern.values()]) * (m.plain_rank // m.rank)
        for adapter in found
        for m in adapter.method.members
        if isinstance(m, LoRA)
    ]
    return max(ranks)


def _lowered(
    change: Change, weights: Sequence[float], how: Combination, rank: int | None
) -> Factors:
    """A LoRA of one layer's combined change."""
    total = how.combine(change.weights, weights)
    kept = rank if how.cuts and rank is not None else whole
    made = decomposed(change.path, change.layer, total, kept, clamp=how.clamp, driver=how.driver)
    given = [bias for bias in change.biases if bias is not None]
    if not given:
        return made
    biases = [torch.zeros_like(given[0]) if b is None else b for b in change.biases]
    return Factors(made.path, made.layer, made.a, made.b, how.combine(biases, weights))


# -- as a configuration -------------------------------------------------------------------------------


def config_of(adapter: Adapter, like: PeftConfig) -> PeftConfig:
    """The configuration of a made adapter: of its own method, otherwise like that of another adapter."""
    method = adapter.method
    places = [place for number in range(len(method.members)) for place in adapter.places(number)]
    targets = list(adapter.origin.suffixes or method.wrapped(places))
    common = {
        name: deepcopy(value)
        for name, value in vars(like).items()
        if name in ("task_type", "base_model_name_or_path", "revision", "inference_mode")
    }
    if isinstance(method, LoRA):
        from trimtab.peft.configs.lora import LoraConfig  # it knows the tuner, and that knows this

        options = {**method.to_peft(places), "modules_to_save": list(method.train) or None}
        new: PeftConfig = LoraConfig(target_modules=targets, **options, **common)
        return new
    changes = {**(method.to_peft(places) if method.peft_type else {}), "target_modules": targets}
    known = {field.name for field in dataclasses.fields(like)}
    return dataclasses.replace(like.copied(), **{k: v for k, v in changes.items() if k in known})
