"""Attach and detach, in place, on any ``nn.Module``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from trimtab.adapt import attention, checkpoint, front, fusing, slots
from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.apart import Apart
from trimtab.adapt.bank import CHILD, Bank, bank_of, find_bank
from trimtab.adapt.contract import Method
from trimtab.adapt.edit import Edit
from trimtab.adapt.fingerprint import fingerprint
from trimtab.adapt.in_peft import TIED
from trimtab.adapt.inside import inner
from trimtab.adapt.observe import Batches, observe
from trimtab.adapt.observed import Observation, Observed, Original
from trimtab.adapt.parse import method_from
from trimtab.adapt.plan import layer_at, planned, resolved, whole_modules
from trimtab.adapt.tensors import Specs, initial_tensors, specs_of
from trimtab.adapt.tied import home_of
from trimtab.adapt.tree import Children, anatomy_of, sites_of, uncover
from trimtab.adapt.wrapping import Wrapping
from trimtab.errors import AttachError, ConfigError, DuplicateNameError
from trimtab.frozen import Layer
from trimtab.models.anatomy import Anatomy
from trimtab.models.originals import Originals, WeightOnDisk


def attach(
    model: nn.Module,
    method: Method | Adapter | str | Mapping[str, Any],
    name: str | None = None,
    *,
    seed: int = 0,
    trainable: bool = True,
    any_base: bool = False,
    batches: Batches | None = None,
    weights: str | Path | None = None,
) -> Adapter:
    """Attach a new adapter of a method, or a saved adapter, to a model, in place.

    The base is frozen and never written; the adapter becomes active and trainable. Initial values depend
    on ``seed`` and on each tensor's own name alone.

    Args:
        model: any ``nn.Module`` with layers that the method can act on.
        method: a method (value, mapping or string) or an `Adapter`.
        name: the adapter's name; by default that of the `Adapter`, or ``"default"``.
        seed: of the initial values.
        trainable: whether the adapter's tensors require gradients.
        any_base: attach an adapter that was made for other weights of the same architecture.
        batches: for a method that begins from data (``LoRA(init="eva")``): each is one call of the model, such as
            a dict with input_ids, attention_mask and labels.
        weights: for ``LoRA(init="loftq")`` on a base in few bits: the folder (or file) of its dense weights; by default
            the one that it was loaded from.

    Raises:
        DuplicateNameError, BaseMismatchError, TargetError, AttachError, DataError: nothing was changed.
    """
    bank = existing_bank(model)
    anatomy = anatomy_of(model)
    base = fingerprint(model, anatomy.modules) if bank is None else bank.known.fingerprint(anatomy)
    if isinstance(method, Adapter):
        adapter = resolved(method, name, anatomy, base, any_base=any_base)
    else:
        adapter = planned(model, method_from(method), name or "default", anatomy)
    if bank is not None and adapter.name in bank.adapters:
        raise DuplicateNameError(
            f"an adapter {adapter.name!r} is attached already; detach it first, or choose another name."
        )
    new = not isinstance(method, Adapter)
    observed: Mapping[str, Sequence[Observed]] = {}
    if new:
        observed = _observed(model, adapter, anatomy, batches, weights)
        if observed:
            informed = adapter.method.informed(observed)
            adapter = planned(model, informed, adapter.name, anatomy)
        adapter.base = base
    specs, tensors = prepared(model, adapter, anatomy, observed, seed, new=new)
    bank = bank or new_bank(model)
    holders: dict[TensorName, nn.Module] = {}
    try:
        _insert(model, bank, adapter, anatomy, specs, tensors, trainable, holders)
    except BaseException:
        _withdraw(model, bank, adapter.name, holders)
        for root in (bank, *(site.slots for site in sites_of(model).values())):
            slots.prune(root)
        raise
    return adapter


def prepared(
    model: nn.Module,
    adapter: Adapter,
    anatomy: Anatomy,
    observed: Mapping[str, Sequence[Observed]] = MappingProxyType({}),
    seed: int = 0,
    *,
    new: bool,
) -> tuple[Specs, dict[TensorName, Tensor]]:
    """What an adapter needs at its sites, and its tensors there; nothing is changed yet. Raises as `attach`."""
    layers = {
        path: layer_at(anatomy, path) for path in dict.fromkeys(site.path for site in adapter.sites)
    }
    specs = specs_of(adapter, anatomy, layers, observed)
    tensors = initial_tensors(adapter, specs, layers, seed, new=new)
    attention.check(model, adapter, anatomy)
    front.check(model, adapter, anatomy)
    return specs, tensors


def detach(model: nn.Module, name: str) -> Adapter:
    """Remove an adapter and hand it back; with the last one, every trace in the model goes too."""
    bank = bank_of(model)
    adapter = bank.require(name)
    holders = adapter.held
    for tensor_name, holder in holders.items():
        slots.get(holder, tensor_name.slot, name)  # present, or this raises before anything changes
    adapter.unbind()
    _withdraw(model, bank, name, holders)
    return adapter


def _observed(
    model: nn.Module,
    adapter: Adapter,
    anatomy: Anatomy,
    batches: Batches | None,
    weights: str | Path | None,
) -> dict[str, list[Observed]]:
    """What data show of the sites of which the method wants to know; or the weights that the base was made of."""
    wants: dict[str, tuple[list[Layer], Observation]] = {}
    originals: list[str] = []
    for site in adapter.sites:
        asked = adapter.methods[site.method].at(site.path).observes(site.role)
        if asked is not None:
            stacked = site.path in anatomy.experts
            one = None if stacked else layer_at(anatomy, site.path)
            layers = anatomy.expert_layers(site.path) if one is None else [one]
            if not isinstance(asked, Original):
                wants[site.path] = layers, asked
            elif any(layer.rounded for layer in layers):
                _check_storage(site.path, layers, asked)
                originals.append(site.path)
    found = observe(model, anatomy, wants, batches)
    if not originals:
        return found
    name = weights or getattr(anatomy.config, "_name_or_path", "") or "this base"
    read = Originals(name, getattr(model, "base_model_prefix", ""))
    return {**found, **{path: [WeightOnDisk(read, path)] for path in originals}}


def _check_storage(path: str, layers: Sequence[Layer], asked: Original) -> None:
    """Raise `ConfigError` where a method needs the base in another storage."""
    found = {layer.storage for layer in layers} - {asked.storage}
    if asked.storage and found:
        raise ConfigError(
            f"init loftq: its steps round {path!r} for just these factors, and it is stored as {found.pop()} and is "
            f"never written. Load the base with storage={asked.storage!r} (exempt='name=nf4' for layers without such "
            "factors), begin with one step (iters=1), or take a dense base."
        )


# -- changing the model -------------------------------------------------------------------------------


def _insert(
    model: nn.Module,
    bank: Bank,
    adapter: Adapter,
    anatomy: Anatomy,
    specs: Specs,
    tensors: Mapping[TensorName, Tensor],
    trainable: bool,
    placed: dict[TensorName, nn.Module],
) -> None:
    """Put edits and tensors in their places; ``placed`` tells how far it came."""
    tree = Wrapping(model, bank, anatomy)
    orders = _orders(adapter)
    holders: dict[TensorName, nn.Module] = {}
    for number in range(len(adapter.methods)):
        for spec in specs[-1 - number, ""].values():
            holders[TensorName("", spec.name)] = bank
    for number, spec_site in enumerate(adapter.sites):
        tied = spec_site.role == TIED
        home = home_of(adapter, spec_site, anatomy) if tied else number
        edit = Edit(
            adapter=adapter.name,
            method=adapter.methods[spec_site.method].at(spec_site.path),
            path=spec_site.path,
            role=spec_site.role,
            block=anatomy.block_of(spec_site.path),
            blocks=len(anatomy.blocks),
            order=orders[number],
            causal=anatomy.causal,
            answers=anatomy.answers(spec_site.path),
            specs=specs[home, adapter.sites[home].path],
            shared=specs[-1 - spec_site.method, ""],
            home=tree.site(adapter.sites[home].path).slots if tied else None,
        )
        within = inner(edit, adapter.method.disk_beside)
        holder = _put(model, bank, edit, anatomy, tree, within)
        if tied:
            continue
        holders |= {TensorName(spec_site.path, held.name): holder for held in edit.tensors.values()}
    for path in anatomy.apart:
        if path not in tree.sites and any(s.path.startswith(f"{path}.") for s in adapter.sites):
            tree.wrap(path, Apart(anatomy.modules[path], path, bank))
    for path in whole_modules(adapter, anatomy):
        tree.whole_module(path, adapter.name)
    fusing.arrange(tree.sites)
    known = {
        TensorName(path, spec.name): spec
        for (_, path), of_site in specs.items()
        for spec in of_site.values()
    }
    stored = {name: holder for name, holder in holders.items() if known[name].stored}
    fixed = adapter.fixed_among(stored)
    for name, value in tensors.items():
        trained = name in stored and name not in fixed
        tensor = nn.Parameter(value, requires_grad=trainable) if trained else value
        slots.add(holders[name], name.slot, adapter.name, tensor, stored=name in stored)
        placed[name] = holders[name]
    adapter.bind(stored, {name: holder for name, holder in holders.items() if name not in stored})
    bank.admit(adapter)


def _put(
    model: nn.Module, bank: Bank, edit: Edit, anatomy: Anatomy, tree: Wrapping, within: str
) -> nn.Module:
    """Put one edit in its place: before the text, inside attention, or around a layer (``within`` a module there).

    Returns the module that holds its tensors.
    """
    if edit.role == front.ROLE:
        front.insert(model, bank, edit, anatomy)
        return bank
    if edit.role == attention.ROLE:
        attention.insert(model, bank, edit, anatomy)
        front.prepare(model, bank, edit, anatomy)
        return attention.holder(bank, edit.path) if edit.tensors else bank
    site = tree.site(edit.path, whole=edit.method.kind == "full", within=within)
    return site.add(edit)


def _withdraw(
    model: nn.Module, bank: Bank, name: str, placed: Mapping[TensorName, nn.Module]
) -> None:
    """Take an adapter's edits and tensors out again; with the last adapter, every trace."""
    if name in bank.merged:
        uncover(model, bank)
    for tensor_name, holder in placed.items():
        slots.withdraw(holder, tensor_name.slot, name)
    bank.dismiss(name)
    sites = list(sites_of(model).values())
    children = Children(model)
    for site in sites:
        site.withdraw(name)
        if site.bare():
            children.replace(site, site.release())
    fusing.arrange(sites_of(model))
    attention.remove(model, bank, name)
    front.remove(bank, name)
    if not bank.adapters and bank.stacked is None:
        strip(model, bank)


def _orders(adapter: Adapter) -> list[tuple[int, int]]:
    """For each site its number among those of its method and role, and how many there are."""
    kinds = [(site.method, site.role) for site in adapter.sites]
    counts, seen = Counter(kinds), Counter[tuple[int, str]]()
    found = []
    for kind in kinds:
        found.append((seen[kind], counts[kind]))
        seen[kind] += 1
    return found


def existing_bank(model: nn.Module) -> Bank | None:
    """The bank of a model, where it has one.

    Raises:
        AttachError: it is that of a part of this model, or of one around it.
    """
    bank = find_bank(model)
    inside = model._modules.get(CHILD) is bank if bank is not None else not sites_of(model)
    if not inside:
        raise AttachError(
            "adapters are attached to a part of this model, or to a model that this is a part of; attach to the "
            "same module each time."
        )
    return bank


def new_bank(model: nn.Module) -> Bank:
    """Freeze the base and put the bank and its entry hooks in place."""
    if CHILD in dir(model):
        raise AttachError(
            f"the model has an attribute {CHILD!r}, the name of Trimtab's own child module."
        )
    bank = Bank()
    for name, parameter in model.named_parameters():
        bank.frozen_before[name] = parameter.requires_grad
        parameter.requires_grad_(False)
    bank.norms = {
        m: False
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    }
    for entry in _entries(model):
        bank.handles.append(entry.register_forward_pre_hook(bank.before, with_kwargs=True))
        bank.handles.append(entry.register_forward_hook(bank.after, always_call=True))
    bank.blocks = [
        module for module in model.modules() if hasattr(module, "gradient_checkpointing")
    ]
    model.add_module(CHILD, bank.train(model.training))
    return bank


def _entries(model: nn.Module) -> list[nn.Module]:
    """The root, and the parts of a transformers model that its own code calls alone."""
    found = [model]
    backbone = model.__dict__.get("base_model_prefix") or getattr(
        type(model), "base_model_prefix", ""
    )
    for name in (str(backbone), "encoder", "decoder", "model.encoder", "model.decoder"):
        node: nn.Module | None = model
        for segment in name.split(".") if name else ["?"]:
            node = node._modules.get(segment) if node is not None else None
        if node is not None and all(node is not other for other in found):
            found.append(node)
    return found


def strip(model: nn.Module, bank: Bank) -> None:
    """Take the bank, its hooks and its changes of flags out of a model."""
    for name, home in bank.homes.items():
        for tensor_name, holder in bank.adapters[name].held.items():
            if holder is home:
                slots.withdraw(home, tensor_name.slot, name)
    for name in list(bank.adapters):
        attention.remove(model, bank, name)
        front.remove(bank, name)
    checkpoint.unwatch(model)
    for handle in bank.handles:
        handle.remove()
    del model._modules[CHILD]
    for encoder in bank.padded:
        encoder.use_nested_tensor = True
    for norm, stopped in bank.norms.items():
        norm.training = model.training if stopped else norm.training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bank.frozen_before.get(name, parameter.requires_grad))
