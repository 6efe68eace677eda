"""PEFT's names of parameters, where a model's own state dict has others.

The tree of a model with adapters has PEFT's names. Its state dict has those of the bare model beside the adapters', so
that a base's tensors go in and out by the names they always had; a `PeftModel`'s has those of the tree, as PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from trimtab.adapt import slots
from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.in_peft import TIED
from trimtab.adapt.site import SiteBase
from trimtab.adapt.tree import sites_of

ROWS = "trainable_tokens_delta"
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def keep_names(module: nn.Module, inner: str) -> None:
    """Let state dicts of a module right around the user's model, which is its child ``inner``, have PEFT's names."""
    module.register_state_dict_post_hook(partial(_show, inner))
    module.register_load_state_dict_pre_hook(partial(_take, inner))


def own_names(model: nn.Module) -> dict[str, str]:
    """Names of a model's tensors in its tree -> those in its state dict, where they are others."""
    wrapped = _wrapped(model)
    found = ((name, _own(name, wrapped)) for name, _ in _tensors(model))
    return {name: own for name, own in found if name != own}


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def adapter_keys(model: nn.Module) -> set[str]:
    """What a model's state dict holds beside the base."""
    wrapped = _wrapped(model)
    held = {id(tensor) for tensor in slots.stored(model).values()}
    return {_own(name, wrapped) for name, tensor in _tensors(model) if id(tensor) in held}


def tree_names(model: nn.Module, adapter: Adapter) -> dict[TensorName, str]:
    """What each tensor of an adapter is called in the tree of a model."""
    found: dict[int, str] = {}
    for name, tensor in _tensors(model):
        found.setdefault(id(tensor), name)
    return {name: found[id(tensor)] for name, tensor in adapter.named().items()}


def link_tied(model: nn.Module, adapter: Adapter) -> None:
    """Let rows of an embedding be named at the heads that are tied to it, too, as in PEFT's state dicts."""
    sites = sites_of(model) if any(site.role == TIED for site in adapter.sites) else {}
    for site in [sites[spec.path] for spec in adapter.sites if spec.path in sites]:
        for edit in site.edits.get(adapter.name, []):
            if edit.home is not None and ROWS in (held.name for held in edit.tensors.values()):
                site.slots._modules.setdefault(ROWS, edit.home._modules[ROWS])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _wrapped(model: nn.Module) -> dict[str, SiteBase]:
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, SiteBase)}


def _own(name: str, wrapped: Mapping[str, SiteBase]) -> str:
    """A name in the state dict of a model whose wrappers lie at these paths."""
    parts, kept, at = name.split("."), list[str](), 0
    while at < len(parts):
        site, rest = wrapped.get(".".join(parts[:at])), parts[at:]
        own = rest if site is None else site.own_name(rest)
        if own == rest:
            kept.append(parts[at])
            at += 1
        elif len(own) < len(rest):
            at += len(rest) - len(own)
        else:
            return ".".join([*kept, *own])
    return ".".join(kept)


def _names(inner: str, module: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """(in the model's own state dict, in PEFT's) of what has two names."""
    root, names = f"{prefix}{inner}.", own_names(module.get_submodule(inner))
    return [(f"{root}{own}", f"{root}{name}") for name, own in names.items()]


def _show(inner: str, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    names = dict(_names(inner, module, prefix))
    whole = {names.get(key, key): value for key, value in state.items()}
    state.clear()
    state.update(whole)


def _take(inner: str, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for own, pefts in _names(inner, module, prefix):
        if pefts in state:
            state[own] = state.pop(pefts)
