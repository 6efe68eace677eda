"""Attach and detach, in place, on any ``nn.Module``; who acts; and what a model looks like now."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt import attention, checkpoint, slots
from trimtab.adapt.adapter import Adapter, Origin, SiteSpec, TensorName
from trimtab.adapt.bank import CHILD, Bank, bank_of, find_bank
from trimtab.adapt.contract import Method, Place, Spec
from trimtab.adapt.edit import Edit
from trimtab.adapt.fingerprint import fingerprint
from trimtab.adapt.parse import method_from, methods
from trimtab.adapt.route import Route
from trimtab.adapt.site import ExpertsSite, Site, SiteBase
from trimtab.adapt.tree import anatomy_of, bare_modules, replace, sites_of
from trimtab.errors import (
    AttachError,
    BaseMismatchError,
    ConfigError,
    DuplicateNameError,
    RouteError,
    TargetError,
    suggest,
)
from trimtab.frozen import Layer, view
from trimtab.frozen.sublayer import SubLayer
from trimtab.models.anatomy import Anatomy
from trimtab.models.families import ROLES


def attach(
    model: nn.Module,
    method: Method | Adapter | str | Mapping[str, Any],
    name: str | None = None,
    *,
    seed: int = 0,
    trainable: bool = True,
    any_base: bool = False,
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

    Raises:
        DuplicateNameError, BaseMismatchError, TargetError, AttachError: nothing was changed.
    """
    bank = _existing_bank(model)
    anatomy = anatomy_of(model)
    base = fingerprint(model, anatomy.modules)
    if isinstance(method, Adapter):
        adapter = _placed(_checked(method, name, base, any_base), anatomy)
        if adapter.base is None:
            _whole(adapter, anatomy)
            adapter.base = base
    else:
        adapter = _planned(model, method_from(method), name or "default", anatomy)
        adapter.base = base
    if bank is not None and adapter.name in bank.adapters:
        raise DuplicateNameError(
            f"an adapter {adapter.name!r} is attached already; detach it first, or choose another name."
        )
    layers = {
        path: _layer(anatomy, path) for path in dict.fromkeys(site.path for site in adapter.sites)
    }
    specs = _specs(adapter, anatomy, layers)
    tensors = _tensors(adapter, specs, layers, seed, new=not isinstance(method, Adapter))
    attention.check(model, adapter, anatomy)
    bank = bank or _new_bank(model)
    placed: dict[TensorName, nn.Module] = {}
    try:
        _insert(model, bank, adapter, anatomy, specs, tensors, trainable, placed)
    except BaseException:
        _withdraw(model, bank, adapter.name, placed)
        raise
    return adapter


def detach(model: nn.Module, name: str) -> Adapter:
    """Remove an adapter and hand it back; with the last one, every trace in the model goes too."""
    bank = bank_of(model)
    adapter = bank.require(name)
    for tensor_name, holder in dict(adapter._holders).items():
        slots.get(holder, tensor_name.slot, name)  # present, or this raises before anything changes
    holders = dict(adapter._holders)
    adapter.unbind()
    _withdraw(model, bank, name, holders)
    return adapter


@contextmanager
def using(model: nn.Module, who: str | Sequence[str] | None) -> Iterator[None]:
    """One adapter (or a stack of several, or None: the bare base) for every row, inside the ``with``."""
    bank = bank_of(model)
    with bank.scope(Route.everyone(bank.owner(who))):
        yield


@contextmanager
def rows(model: nn.Module, owners: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """One adapter (or stack, or None) per row of the batch, in any mix of methods."""
    bank = bank_of(model)
    if isinstance(owners, str):
        raise RouteError(
            f"rows takes one name per row, not the text {owners!r}; use using() for one adapter."
        )
    with bank.scope(Route(tuple(bank.owner(who) for who in owners))):
        yield


def enable(model: nn.Module, name: str) -> None:
    """Let an attached adapter act again where no scope says otherwise."""
    bank = bank_of(model)
    bank.require(name)
    bank.disabled.discard(name)


def disable(model: nn.Module, name: str) -> None:
    """Keep an attached adapter from acting where no scope says otherwise."""
    bank = bank_of(model)
    bank.require(name)
    bank.disabled.add(name)


def scale(model: nn.Module, name: str, factor: float) -> None:
    """Set how far an adapter's edits go: 0 is the base, 1 the adapter as trained."""
    bank = bank_of(model)
    adapter = bank.require(name)
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        raise ConfigError(f"scale of {name!r} must be a finite number, not {factor!r}.")
    if factor != 1.0 and any(method.overrides("keys_values") for method in adapter.methods):
        raise TargetError(
            f"adapter {name!r} adds keys and values inside attention; there is no scaled form of that."
        )
    bank.scales[name] = float(factor)


def stack(model: nn.Module, names: Sequence[str]) -> None:
    """Which adapters act, and in which order they nest (first innermost), where no scope says otherwise."""
    bank = bank_of(model)
    chosen = bank.owner(tuple(names))
    bank.active = [*chosen, *(name for name in bank.adapters if name not in chosen)]
    bank.disabled = set(bank.adapters) - set(chosen)


# -- planning -----------------------------------------------------------------------------------------


def _planned(model: nn.Module, method: Method, name: str, anatomy: Anatomy) -> Adapter:
    """An adapter without tensors: the method resolved to this model's sites."""
    places = list(method.place(anatomy))
    if not places:
        raise TargetError(f"{method.kind} finds no place to act in {type(model).__name__}.")
    found = [method]
    sites = [SiteSpec(place.path, place.role, 0) for place in places]
    if method.train:
        full = methods.get("full").parse({"targets": method.train})
        found.append(full)
        trained = [place.path for place in full.place(anatomy)]
        both = sorted(set(trained) & {place.path for place in places})
        if both:
            raise TargetError(
                f"{both[0]!r} is both adapted and trained in full; exclude it from the targets."
            )
        sites += [SiteSpec(path, "", 1) for path in trained]
    return Adapter(name, found, sites, {}, origin=_origin(model, method, sites, anatomy))


def _origin(
    model: nn.Module, method: Method, sites: Sequence[SiteSpec], anatomy: Anatomy
) -> Origin:
    """What an adapter's folder is to say of this base."""
    places = [Place(site.path, site.role) for site in sites if site.method == 0]
    paths = method.wrapped(places)
    layers = [_layer(anatomy, path) for path in paths]
    kind = type(model).__name__
    task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)
    headless = not any(site.method and site.path in anatomy.head for site in sites)
    return Origin(
        base_name=getattr(anatomy.config, "_name_or_path", None) or None,
        task_type=None if headless and task in _HEADS_TOO else task,
        suffixes=_suffixes(paths, anatomy),
        transposed=any(layer.transposed for layer in layers),
        in_peft=method.in_peft(anatomy, places) and all(layer.in_peft for layer in layers),
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


def _checked(adapter: Adapter, name: str | None, base: Any, any_base: bool) -> Adapter:
    """A saved adapter, copied and checked against this base."""
    if adapter.base is not None:
        reason = adapter.base.mismatch(base)
        same_shape = adapter.base.architecture == base.architecture
        if reason and not (any_base and same_shape):
            advice = " Pass any_base=True to attach it all the same." if same_shape else ""
            raise BaseMismatchError(
                f"adapter {adapter.name!r} was made for another base: {reason}.{advice}"
            )
    return adapter.detached(name=name)


def _placed(adapter: Adapter, anatomy: Anatomy) -> Adapter:
    """A file whose tensors belong to the whole adapter (PEFT's prefix) names no sites: find them here."""
    if all(site.method for site in adapter.sites):
        found = [SiteSpec(p.path, p.role, 0) for p in adapter.method.place(anatomy)]
        adapter.sites = (*found, *adapter.sites)
    return adapter


def _whole(adapter: Adapter, anatomy: Anatomy) -> None:
    """Refuse a foreign file that lacks the tensors of a module which its config names.

    A name that nothing here has is passed over: published configs list those of several architectures.
    """
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
    lacking = [p for p in anatomy.modules if p in wanted - {site.path for site in adapter.sites}]
    if lacking:
        raise AttachError(
            f"adapter {adapter.name!r} has no tensors for {len(lacking)} modules that its config names, e.g. "
            f"{lacking[0]!r}: its weights are incomplete, or were made for another model."
        )


def _layer(anatomy: Anatomy, path: str) -> Layer:
    """The view of the layer at a path (expert 0 of an expert parameter)."""
    if path in anatomy.experts:
        return anatomy.expert_layers(path)[0]
    if path not in anatomy.modules:
        hint = suggest(path, [*anatomy.modules, *anatomy.experts])
        raise AttachError(f"this model has no module {path!r}.{hint}")
    if path == "":
        raise TargetError(
            "the model itself is the target; put it into a container module and attach to that."
        )
    module = anatomy.modules[path]
    return view(module) or SubLayer(module, anatomy.width, anatomy.around(path))


def _specs(
    adapter: Adapter, anatomy: Anatomy, layers: Mapping[str, Layer]
) -> dict[tuple[int, str], dict[str, Spec]]:
    """Specs by (number of the site, or -1 - number of the method for its shared tensors; path)."""
    found: dict[tuple[int, str], dict[str, Spec]] = {}
    for number, site in enumerate(adapter.sites):
        method = adapter.methods[site.method].at(site.path)
        if site.path in anatomy.experts:
            each = anatomy.expert_layers(site.path)
            specs = _stacked([method.tensors(layer, site.role) for layer in each])
        else:
            specs = method.tensors(layers[site.path], site.role)
        found[number, site.path] = specs
    for number, method in enumerate(adapter.methods):
        found[-1 - number, ""] = method.shared(anatomy, adapter.places(number))
    return found


def _stacked(each: Sequence[Mapping[str, Spec]]) -> dict[str, Spec]:
    """The same tensors for every expert, stacked; each starts as it would alone."""

    def stacked(short: str) -> Spec:
        specs = [of_expert[short] for of_expert in each]

        def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            return torch.stack([spec.init(spec.shape, generator) for spec in specs])

        return Spec(specs[0].name, (len(specs), *specs[0].shape), init, specs[0].cast)

    return {short: stacked(short) for short in each[0]}


def _tensors(
    adapter: Adapter,
    specs: Mapping[tuple[int, str], Mapping[str, Spec]],
    layers: Mapping[str, Layer],
    seed: int,
    *,
    new: bool,
) -> dict[TensorName, Tensor]:
    """Initial values of a new adapter, or the checked tensors of a saved one, on their layers' devices."""
    expected: dict[TensorName, Spec] = {}
    for (_, path), of_site in specs.items():
        for spec in of_site.values():
            tensor_name = TensorName(path, spec.name)
            if tensor_name in expected:
                raise TargetError(
                    f"two methods of {adapter.name!r} want the slot {tensor_name.key!r}."
                )
            expected[tensor_name] = spec
    devices = [layer.device for layer in layers.values()]
    default = devices[0] if devices else torch.device("cpu")
    given = adapter.named()
    if not new:
        _same_tensors(adapter, expected, given)
    made: dict[TensorName, Tensor] = {}
    for tensor_name, spec in expected.items():
        layer = layers.get(tensor_name.path)
        device = default if layer is None else layer.device
        if not new:
            value = given[tensor_name]
            if value.is_floating_point():
                value = value.to(torch.promote_types(value.dtype, torch.float32))
        elif device.type == "meta":
            value = torch.empty(spec.shape, device="meta")
        else:
            value = spec.init(spec.shape, _generator(seed, tensor_name.key))
        made[tensor_name] = value.to(device).clone()
    return made


def _same_tensors(
    adapter: Adapter, expected: Mapping[TensorName, Spec], given: Mapping[TensorName, Tensor]
) -> None:
    missing = sorted(name.key for name in expected if name not in given)
    extra = sorted(name.key for name in given if name not in expected)
    if missing or extra:
        parts = [f"it lacks {len(missing)}, e.g. {missing[0]!r}"] if missing else []
        parts += (
            [f"it has {len(extra)} that its method does not use here, e.g. {extra[0]!r}"]
            if extra
            else []
        )
        raise AttachError(
            f"adapter {adapter.name!r} has other tensors than this model needs: {'; '.join(parts)}."
        )
    for name, spec in expected.items():
        if tuple(given[name].shape) != spec.shape:
            raise AttachError(
                f"adapter {adapter.name!r}: {name.key!r} has shape {tuple(given[name].shape)}, "
                f"this model needs {spec.shape}."
            )


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# -- changing the model -------------------------------------------------------------------------------


def _insert(
    model: nn.Module,
    bank: Bank,
    adapter: Adapter,
    anatomy: Anatomy,
    specs: Mapping[tuple[int, str], Mapping[str, Spec]],
    tensors: Mapping[TensorName, Tensor],
    trainable: bool,
    placed: dict[TensorName, nn.Module],
) -> None:
    """Put edits and tensors in their places; ``placed`` tells how far it came."""
    existing = sites_of(model)
    holders: dict[TensorName, nn.Module] = {}
    for number in range(len(adapter.methods)):
        for spec in specs[-1 - number, ""].values():
            holders[TensorName("", spec.name)] = bank
    for number, spec_site in enumerate(adapter.sites):
        method = adapter.methods[spec_site.method].at(spec_site.path)
        holder: nn.Module = bank
        if spec_site.role != attention.ROLE:
            site = _site(model, bank, spec_site.path, anatomy, existing)
            holder = (
                site.holder(spec_site.path.rpartition(".")[2])
                if isinstance(site, ExpertsSite)
                else site
            )
        edit = Edit(
            adapter=adapter.name,
            method=method,
            path=spec_site.path,
            role=spec_site.role,
            block=anatomy.block_of(spec_site.path),
            order=_order(adapter, number),
            causal=anatomy.causal,
            specs=specs[number, spec_site.path],
            shared=specs[-1 - spec_site.method, ""],
        )
        if spec_site.role == attention.ROLE:
            attention.insert(model, bank, edit, anatomy)
        else:
            site.edits.setdefault(adapter.name, []).append(edit)
        holders |= {TensorName(spec_site.path, spec.name): holder for spec in edit.tensors.values()}
    for name, value in tensors.items():
        parameter = nn.Parameter(value, requires_grad=trainable and value.is_floating_point())
        slots.add(holders[name], name.slot, adapter.name, parameter)
        placed[name] = holders[name]
    adapter.bind(holders)
    bank.adapters[adapter.name] = adapter
    bank.active.append(adapter.name)


def _withdraw(
    model: nn.Module, bank: Bank, name: str, placed: Mapping[TensorName, nn.Module]
) -> None:
    """Take an adapter's edits and tensors out again; with the last adapter, every trace."""
    for tensor_name, holder in placed.items():
        slots.remove(holder, tensor_name.slot, name)
    slots.prune(bank)
    for site in list(sites_of(model).values()):
        site.edits.pop(name, None)
        slots.prune(site)
        if site.bare():
            replace(model, site, site.base_layer)
    attention.remove(model, bank, name)
    bank.adapters.pop(name, None)
    bank.active = [other for other in bank.active if other != name]
    bank.scales.pop(name, None)
    bank.disabled.discard(name)
    if not bank.adapters:
        strip(model, bank)


def _order(adapter: Adapter, number: int) -> tuple[int, int]:
    """The number of a site among those of its method and role, and how many there are."""
    site = adapter.sites[number]
    alike = [
        other for other in adapter.sites if (other.method, other.role) == (site.method, site.role)
    ]
    return alike.index(site), len(alike)


def _site(
    model: nn.Module, bank: Bank, path: str, anatomy: Anatomy, existing: dict[str, SiteBase]
) -> SiteBase:
    """The wrapper at a path, made if there is none yet."""
    where = anatomy.experts.get(path, path)
    if where not in existing:
        module = anatomy.modules[where]
        site = (
            ExpertsSite(module, where, bank)
            if path in anatomy.experts
            else Site(module, where, bank, anatomy.width)
        )
        replace(model, module, site)
        existing[where] = site
    return existing[where]


def _existing_bank(model: nn.Module) -> Bank | None:
    bank = find_bank(model)
    inside = model._modules.get(CHILD) is bank if bank is not None else not sites_of(model)
    if not inside:
        raise AttachError(
            "adapters are attached to a part of this model, or to a model that this is a part of; attach to the "
            "same module each time."
        )
    return bank


def _new_bank(model: nn.Module) -> Bank:
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
    model.add_module(CHILD, bank)
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
    for name in list(bank.adapters):
        attention.remove(model, bank, name)
    checkpoint.unwatch(model)
    for handle in bank.handles:
        handle.remove()
    del model._modules[CHILD]
    for norm, stopped in bank.norms.items():
        norm.training = model.training if stopped else norm.training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bank.frozen_before.get(name, parameter.requires_grad))


# -- looking ------------------------------------------------------------------------------------------


def probe(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Run the model once on these inputs and name the sites that were never reached (none is good).

    Without inputs, a transformers model is run on a few token ids of its own vocabulary.
    """
    bank = bank_of(model)
    if not args and not kwargs:
        kwargs = _tiny_inputs(model)
    bank.fired = set()
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            model(*args, **kwargs)
        reached = bank.fired
    finally:
        bank.fired = None
        model.train(training)
    wanted = {site.path for adapter in bank.adapters.values() for site in adapter.sites}
    return sorted(wanted - reached)


def _tiny_inputs(model: nn.Module) -> dict[str, Tensor]:
    config = model.__dict__.get("config")
    size = getattr(config, "vocab_size", None)
    if size is None:
        raise AttachError(
            f"probe needs example inputs for {type(model).__name__}: probe(model, x)."
        )
    device = next(model.parameters()).device
    ids = torch.arange(4, 8, device=device)[None] % int(size)
    return {
        "input_ids": ids,
        **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}),
    }


def bare_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the bare model, by canonical name."""
    found: dict[str, Tensor] = {}
    for path, module in bare_modules(model).items():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found
