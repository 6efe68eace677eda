"""Planning: a method, or a saved adapter, resolved to the sites of one model; nothing is changed here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from trimtab.adapt.adapter import Adapter, Origin, SiteSpec, whole
from trimtab.adapt.contract import Method, Place
from trimtab.adapt.disk import checksum
from trimtab.adapt.fingerprint import Fingerprint
from trimtab.adapt.in_peft import TIED
from trimtab.adapt.multihead import check_opened, named_by_peft
from trimtab.errors import (
    AttachError,
    BaseMismatchError,
    TargetError,
    UnsupportedError,
    suggest,
)
from trimtab.frozen import Layer
from trimtab.models.anatomy import Anatomy
from trimtab.models.families import ROLES
from trimtab.models.repeat import repeated


def planned(model: nn.Module, method: Method, name: str, anatomy: Anatomy) -> Adapter:
    """An adapter without tensors: the method resolved to this model's sites."""
    sites: list[SiteSpec] = []
    for number, part in enumerate(whole(method)):
        found = [SiteSpec(place.path, place.role, number) for place in part.place(anatomy)]
        if not found:
            raise TargetError(f"{part.kind} finds no place to act in {type(model).__name__}.")
        if part.layer_drop and not anatomy.blocks:
            raise TargetError(
                f"layer_drop: {type(model).__name__} has no blocks that Trimtab knows."
            )
        if part.layer_drop and part.overrides("virtual_embeddings"):
            raise UnsupportedError(
                f"layer_drop: {part.kind} stands before the text, in no block, so it cannot be left out by block."
            )
        sites += found
    check_opened([site.path for site in sites], anatomy.uncalled)
    _once_in_full(method, sites)
    return Adapter(name, method, sites, {}, origin=_origin(model, method, sites, anatomy))


def _once_in_full(method: Method, sites: Sequence[SiteSpec]) -> None:
    """What replaces a layer whole leaves no room for another edit of it."""
    for number, part in enumerate(whole(method)):
        if part.kind == "full":
            others = {site.path for site in sites if site.method != number}
            both = sorted(others & {site.path for site in sites if site.method == number})
            if both:
                raise TargetError(
                    f"{both[0]!r} is both adapted and trained in full; exclude it from the targets."
                )


def _origin(
    model: nn.Module, method: Method, sites: Sequence[SiteSpec], anatomy: Anatomy
) -> Origin:
    """What an adapter's folder is to say of this base."""
    parts = len(method.members)
    places = [Place(site.path, site.role) for site in sites if site.method < parts]
    paths = method.wrapped(
        [Place(site.path, site.role) for site in sites if site.method < method.peft_parts]
    )
    named = [path for path in paths if path not in anatomy.experts]
    layers = [layer_at(anatomy, path) for path in named]
    opens = any(path in anatomy.opened for path in named)
    kind = type(model).__name__
    task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)
    apart = {path.rpartition(".")[2] for path in named} & _FUSED if anatomy.experts else set()

    def known(method: Method) -> bool:
        alike = not any(method.peft_differs(layer) for layer in layers) and not apart
        nests = method.peft_nests or named == paths
        opened = method.peft_opens or not opens
        return alike and nests and opened and method.in_peft(anatomy, places)

    in_peft, plain = known(method), method.plain()
    headless = not any(site.method >= parts and site.path in anatomy.head for site in sites)
    return Origin(
        base_name=getattr(anatomy.config, "_name_or_path", None) or None,
        task_type=None if headless and task in _HEADS_TOO else task,
        suffixes=_suffixes(named_by_peft(named), anatomy),
        transposed=any(layer.transposed for layer in layers),
        in_peft=in_peft,
        plain_in_peft=None if in_peft or plain == method else known(plain),
    )


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's task by the end of a model class's name; without one, PEFT ignores a prefix."""
_FUSED = frozenset({"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"})
"""Layers that PEFT takes for parts of experts, wherever they lie in a model that has experts."""
_HEADS_TOO = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT expects the trained head in the file."""


def _suffixes(paths: Sequence[str], anatomy: Anatomy) -> tuple[str, ...] | None:
    """The shortest module names that select exactly these paths by PEFT's rule, if there are any."""
    wanted = set(paths)
    leaves = tuple(sorted({path.rpartition(".")[2] for path in paths}))
    reached = {
        path
        for path in anatomy.modules
        for leaf in leaves
        if path == leaf or path.endswith(f".{leaf}")
    }
    return leaves if reached == wanted else None


def other_base(adapter: Adapter, base: Fingerprint) -> str:
    """Why a base is another than the adapter's, but for what it has its own values of; empty if it is not."""
    if adapter.base is None:
        return ""
    own = {
        f"{site.path}.{name}"
        for site in adapter.sites
        for name in adapter.methods[site.method].at(site.path).instead_of
    }
    return adapter.base.mismatch(base, own)


def resolved(
    adapter: Adapter,
    name: str | None,
    anatomy: Anatomy,
    base: Fingerprint,
    *,
    any_base: bool = False,
) -> Adapter:
    """A copy of a saved adapter with the sites that it has on this model. Raises as `trimtab.attach`."""
    found = placed(checked(adapter, name, base, any_base), anatomy)
    if found.base is None:
        check_whole(found, anatomy)
        found.base = base
    return found


def checked(adapter: Adapter, name: str | None, base: Any, any_base: bool) -> Adapter:
    """A saved adapter, copied and checked against this base, but for what it has its own values of."""
    if adapter.base is not None:
        reason = other_base(adapter, base)
        same_shape = adapter.base.architecture == base.architecture
        if reason and not (any_base and same_shape):
            advice = " Pass any_base=True to attach it all the same." if same_shape else ""
            raise BaseMismatchError(
                f"adapter {adapter.name!r} was made for another base: {reason}.{advice}"
            )
        if stored := adapter.base.other_storage(base):
            warnings.warn(
                f"adapter {adapter.name!r} was trained beside this base in another storage: {stored}. Its weights are "
                "rounded otherwise, so the adapter may answer otherwise. Load the base as the adapter knows it, or "
                "measure again.",
                stacklevel=4,
            )
    return adapter.detached(name=name)


def placed(adapter: Adapter, anatomy: Anatomy) -> Adapter:
    """A file whose tensors belong to the whole adapter (PEFT's prefix) names no sites: find them here."""
    if all(site.method for site in adapter.sites):
        found = [SiteSpec(p.path, p.role, 0) for p in adapter.method.place(anatomy)]
        adapter.sites = (*found, *adapter.sites)
    check_opened([site.path for site in adapter.sites], anatomy.uncalled)
    if adapter.base is None:
        _same_repeats(adapter, anatomy)
        _tie(adapter, anatomy)
    return adapter


def _same_repeats(adapter: Adapter, anatomy: Anatomy) -> None:
    """An adapter of a model whose blocks are repeated needs one whose blocks are repeated so."""
    found = repeated(anatomy.modules.values())
    if adapter.origin.repeats and (found is None or found.ranges != adapter.origin.repeats):
        raise AttachError(
            f"adapter {adapter.name!r} was made for a model whose blocks are repeated as {adapter.origin.repeats} "
            "(layer_replication), and this one's are not. Repeat them first: trimtab.repeat_blocks(model, ranges)."
        )


def _tie(adapter: Adapter, anatomy: Anatomy) -> None:
    """What PEFT's file says of an embedding holds for a head that is tied to it, too, where it says so; for the rows of
    an embedding it always does.
    """
    for site in adapter.sites:
        if site.path not in anatomy.modules or site.role:
            continue
        method = adapter.methods[site.method]
        present = {other.path for other in adapter.sites if other.method == site.method}
        for path in [p for p in anatomy.tied(site.path) if p not in present]:
            if dict(method).get("tie", False):
                adapter.sites = (*adapter.sites, SiteSpec(path, TIED, site.method))


def check_whole(adapter: Adapter, anatomy: Anatomy) -> None:
    """Refuse a foreign file that lacks the tensors of a module which its config names.

    A name that nothing here has is passed over: published configs list those of several architectures.
    """
    _same_copies(adapter, anatomy)
    check_function(adapter, anatomy)
    method = adapter.method
    wanted: set[str] = set()
    for selectors, change in (
        (method.targets, wanted.update),
        (method.exclude, wanted.difference_update),
    ):
        for selector in (selectors,) if isinstance(selectors, str) else selectors:
            if selector not in ROLES:
                with suppress(TargetError):
                    change(anatomy.select(selector, (), method.layers))
    there = [site.path for site in adapter.sites]
    wanted.difference_update(there, named_by_peft(there))
    lacking = [path for path in anatomy.modules if path in wanted]
    if lacking:
        raise AttachError(
            f"adapter {adapter.name!r} has no tensors for {len(lacking)} modules that its config names, e.g. "
            f"{lacking[0]!r}: its weights are incomplete, or were made for another model."
        )


def whole_modules(adapter: Adapter, anatomy: Anatomy) -> list[str]:
    """The modules of several layers that an adapter trains in full, the outermost of those that lie in each other."""
    found: list[str] = []
    for number, method in enumerate(adapter.methods):
        layers = [site.path for site in adapter.sites if site.method == number]
        targets = (method.targets,) if isinstance(method.targets, str) else method.targets
        for target in targets if method.kind == "full" else ():
            named = [p for p in anatomy.modules if f".{p}".endswith(f".{target}")]
            with suppress(TargetError):
                named += anatomy.select(target, method.exclude, method.layers)
            found += [p for p in named if any(layer.startswith(f"{p}.") for layer in layers)]
    called = [p for p in found if not isinstance(anatomy.modules[p], nn.ModuleList | nn.ModuleDict)]
    return [p for p in dict.fromkeys(called) if not any(p.startswith(f"{q}.") for q in called)]


def check_function(adapter: Adapter, anatomy: Anatomy) -> None:
    """Refuse a file of PEFT's that means another function there than it would here."""
    foreign = adapter.base is None and adapter.origin.in_peft
    for site in adapter.sites if foreign else ():
        if site.path in anatomy.modules and site.method < len(adapter.method.members):
            method = adapter.methods[site.method]
            if why := method.peft_differs(layer_at(anatomy, site.path)):
                raise UnsupportedError(
                    f"adapter {adapter.name!r} is of PEFT's, and at {site.path!r} PEFT's {method.kind} is another "
                    f"function than Trimtab's: {why}. Leave this layer out there, or train it here."
                )


def _same_copies(adapter: Adapter, anatomy: Anatomy) -> None:
    """The base's weights that PEFT copied into its file must be those of this base."""
    for path, found in adapter.origin.copies.items():
        layer = layer_at(anatomy, path)
        weight = layer.stored().get("weight")
        if (
            weight is not None
            and weight.device.type != "meta"
            and found != checksum(weight.bfloat16())
        ):
            raise BaseMismatchError(
                f"adapter {adapter.name!r} was trained beside another {path!r} than this model's: its file holds a "
                "copy of that weight. Was the vocabulary resized, or the embedding changed? Give the base that weight "
                "first."
            )


def layer_at(anatomy: Anatomy, path: str) -> Layer:
    """`Anatomy.layer`, with errors for a path that this model lacks and for the model itself."""
    if path not in anatomy.modules and path not in anatomy.parameters:
        hint = suggest(path, [*anatomy.modules, *anatomy.parameters])
        raise AttachError(f"this model has no module {path!r}.{hint}")
    if path == "":
        raise TargetError(
            "the model itself is the target; put it into a container module and attach to that."
        )
    return anatomy.layer(path)
