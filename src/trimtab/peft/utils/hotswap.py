"""Swapping one adapter for another in place, so that what torch compiled goes on as it is.

The parameters stay, their values change. What else differs between two LoRAs is put into the values: another alpha
becomes a factor on B, a smaller rank zeros in A and B. Only a larger rank needs larger parameters;
`prepare_model_for_compiled_hotswap` makes room for it before the model is compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import exactly
from trimtab.adapt.export import exported
from trimtab.adapt.factors import EMBEDDED, FACTORS, OFFSET
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.plan import check_function, checked
from trimtab.adapt.tree import anatomy_of, sites_of
from trimtab.errors import AttachError, ConfigError, UnsupportedError
from trimtab.methods.dora import DoRA
from trimtab.methods.lora import LoRA
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.conversion import padded
from trimtab.peft.find import configs_of, root_of
from trimtab.peft.hub import local_adapter

__all__ = ["hotswap_adapter", "prepare_model_for_compiled_hotswap"]


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **hub: Any,
) -> None:
    """Give an attached adapter the values of a saved one, in place; all of them, or none.

    A layer that the saved one does not edit is left as the base has it.

    Args:
        model: with the adapter attached, compiled or not.
        model_name_or_path: the folder or the repository of the saved one.
        adapter_name: of the attached one; it keeps its name.
        torch_device: of no effect: values go where the parameters are.
        hub: ``subfolder``, ``revision``, ``token`` and what else names a file on the hub.

    Raises:
        AttachError: the saved one does not fit, or the attached one is merged; nothing was changed.
        BaseMismatchError: it was made for another base.
        UnsupportedError: it is of PEFT's, and another function there.
    """
    root = root_of(model)
    bank = bank_of(root)
    present = bank.require(adapter_name)
    if adapter_name in bank.merged:
        raise AttachError(
            f"adapter {adapter_name!r} is merged: unmerge it first, with model.unmerge_adapter()."
        )
    subfolder = hub.pop("subfolder", None)
    found = Adapter.load(local_adapter(model_name_or_path, subfolder, **hub), name=adapter_name)
    new = checked(found, adapter_name, present.base, any_base=False)
    check_function(new, anatomy_of(root))
    values = _values(root, present, new)
    live = present.named()
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)


def _values(model: nn.Module, present: Adapter, new: Adapter) -> dict[TensorName, Tensor]:
    """What each tensor of the attached adapter becomes."""
    live = present.named()
    given = new.named()
    alike = {n: t.shape for n, t in live.items()} == {n: t.shape for n, t in given.items()}
    if alike and present.method == new.method:
        return given
    kinds = [{member.kind for member in a.method.members} for a in (present, new)]
    low_rank = kinds[0] == kinds[1] and kinds[0] in ({"lora"}, {"dora"})
    if not low_rank or _parts(present) != _parts(new):
        raise AttachError(
            f"adapter {present.name!r} is {present.method.kind} and the saved one {new.method.kind} or of other "
            "options: values can be swapped between LoRAs, between DoRAs, and between equal methods."
        )
    new = exported(new)
    if exported(present).method != present.method:
        raise AttachError(
            f"adapter {present.name!r} keeps the values that it began from; load the saved one with load_adapter."
        )
    return _fitted(model, present, new)


def _parts(adapter: Adapter) -> tuple[int, float]:
    first = adapter.method.members[0]
    dropout = first.dropout if isinstance(first, LowRank) else 0.0
    return len(adapter.method.members), dropout


def _fitted(model: nn.Module, present: Adapter, new: Adapter) -> dict[TensorName, Tensor]:
    """The values of another LoRA at the attached one's ranks and scalings."""
    live, given = present.named(), new.named()
    sites = {(site.path, site.role) for site in present.sites}
    extra = sorted({site.path for site in new.sites if (site.path, site.role) not in sites})
    if extra:
        raise AttachError(
            f"the saved adapter edits {len(extra)} layers that {present.name!r} does not, such as {extra[0]!r}; load "
            "it with load_adapter."
        )
    values: dict[TensorName, Tensor] = {}
    for site in present.sites:
        own = {name: tensor for name, tensor in live.items() if name.path == site.path}
        there = {name: tensor for name, tensor in given.items() if name.path == site.path}
        old = present.methods[site.method].at(site.path)
        if not isinstance(old, LowRank) or site.role in BIASES:
            names = [n for n in own if n.slot not in (*FACTORS, *EMBEDDED)]
            values |= _same(names, own, there, present.name)
            continue
        other = [s for s in new.sites if (s.path, s.role) == (site.path, site.role)]
        if not other:
            values |= _nothing(model, own, old)
            continue
        method = new.methods[other[0].method].at(site.path)
        if not isinstance(method, LowRank):
            raise AssertionError("the methods are of one kind")
        values |= _factors(own, there, old, method, present.name)
    return values


def _same(
    names: list[TensorName],
    own: Mapping[TensorName, Tensor],
    there: Mapping[TensorName, Tensor],
    name: str,
) -> dict[TensorName, Tensor]:
    """Tensors that both have; a bias or a head has no value that would be none."""
    for key in names:
        if key not in there or there[key].shape != own[key].shape:
            raise AttachError(
                f"the saved adapter has no {key.key!r} of shape {tuple(own[key].shape)}, which {name!r} has; load it "
                "with load_adapter."
            )
    return {key: there[key] for key in names}


def _nothing(
    model: nn.Module, own: Mapping[TensorName, Tensor], method: LowRank
) -> dict[TensorName, Tensor]:
    """Values with which a LoRA does nothing: B and its bias, or an embedding's A, as they start."""
    starts = (FACTORS[1], EMBEDDED[1], OFFSET)
    zero = {n: torch.zeros_like(t) for n, t in own.items() if n.slot in starts}
    if isinstance(method, DoRA):
        path = next(iter(own)).path
        norms = sites_of(model)[path].layer.row_norms()
        slot = "lora_magnitude_vector.weight"
        zero |= {n: norms.reshape(t.shape) for n, t in own.items() if n.slot == slot}
    return zero


def _factors(
    own: Mapping[TensorName, Tensor],
    there: Mapping[TensorName, Tensor],
    old: LowRank,
    new: LowRank,
    name: str,
) -> dict[TensorName, Tensor]:
    """A and B of one layer with zeros up to the rank there is, and the ratio of the scalings in B and its bias."""
    path = next(iter(own)).path
    if any(n.slot == OFFSET for n in there) and not any(n.slot == OFFSET for n in own):
        raise AttachError(
            f"{path}: the saved adapter has a bias of B, and {name!r} has no place for it; load it with load_adapter."
        )
    a, b = (
        next(TensorName(path, s[i]) for s in (FACTORS, EMBEDDED) if TensorName(path, s[i]) in own)
        for i in (0, 1)
    )
    if new.rank > old.rank:
        raise AttachError(
            f"{path}: the saved adapter has rank {new.rank}, and there is room for {old.rank}. Call "
            f"prepare_model_for_compiled_hotswap(model, target_rank={new.rank}) before the model is compiled; or load "
            "it with load_adapter, which makes new parameters."
        )
    values = dict(zip((a, b), padded(there[a], there[b], new.rank, old.rank), strict=True))
    ratio = new.scaling / old.scaling
    values[b] = values[b] * ratio
    if values[a].shape != own[a].shape or values[b].shape != own[b].shape:
        raise AttachError(f"{path}: the saved adapter was made for a layer of another shape.")
    factors = {*FACTORS, *EMBEDDED}
    rest = [n for n in own if n.slot not in factors and not n.slot.startswith("lora_bias")]
    same = _same(rest, own, there, name)
    return values | {n: t * ratio if n.slot == OFFSET else t for n, t in same.items()}


# -- making room --------------------------------------------------------------------------------------


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Give the LoRAs of a model room for others up to a rank, before the model is compiled.

    What they compute stays the same. Without ``target_rank`` nothing is needed: another alpha goes into the values.

    Args:
        model: with its first adapters attached, not compiled yet; the parameters become new ones, so make the
            optimizer afterwards.
        target_rank: the largest rank that will be swapped in.
        config: configurations that are to say the new rank too; those of ``model`` itself are changed anyway.
        check_compiled: what to do where the model is compiled already.

    Raises:
        AttachError: there is no LoRA in the model.
        ConfigError: it is compiled already, or an adapter has a larger rank.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled is 'error', 'warn' or 'ignore', not {check_compiled!r}.")
    if _compiled(model) and check_compiled != "ignore":
        text = "prepare_model_for_compiled_hotswap must be called before the model is compiled."
        if check_compiled == "error":
            raise ConfigError(text)
        warnings.warn(f"{text} It will be compiled anew.", stacklevel=2)
    root = root_of(model)
    bank = bank_of(root)
    found = [a for a in bank.adapters.values() if isinstance(a.method, LoRA | DoRA)]
    if not found:
        raise AttachError("there is no LoRA in the model to make room in; attach it first.")
    if target_rank is None:
        return
    wider = [_widened(adapter, target_rank) for adapter in found]  # all of them, or none
    for adapter in wider:
        _replaced(root, adapter)
    own = configs_of(model)
    chosen = config if isinstance(config, Mapping) else {"": config} if config is not None else {}
    every = [*chosen.values(), *(own[adapter.name] for adapter in wider if adapter.name in own)]
    for one in {id(each): each for each in every}.values():
        _tell(one, target_rank)


def _compiled(model: nn.Module) -> bool:
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None


def _widened(adapter: Adapter, wanted: int) -> Adapter:
    """A free copy with zeros up to a rank, at the same scalings."""
    copy = exported(adapter)
    tensors = copy.named()
    alphas: dict[str, float] = {}
    for site in copy.sites:
        method = copy.methods[site.method].at(site.path)
        if not isinstance(method, LowRank) or site.role in BIASES:
            continue
        if method.rank > wanted:
            raise ConfigError(
                f"target_rank={wanted} is smaller than the rank {method.rank} of {adapter.name!r} at {site.path}."
            )
        a, b = (
            next(n for s in (FACTORS, EMBEDDED) if (n := TensorName(site.path, s[i])) in tensors)
            for i in (0, 1)
        )
        pair = padded(tensors[a], tensors[b], method.rank, wanted)
        tensors |= dict(zip((a, b), pair, strict=True))
        alphas[site.path] = method.scaling * (wanted**0.5 if method.rslora else wanted)
    usual = max(alphas.values(), key=list(alphas.values()).count)
    other = {exactly(path, alphas): alpha for path, alpha in alphas.items() if alpha != usual}
    method = copy.method.replace(rank=wanted, alpha=usual, rank_pattern={}, alpha_pattern=other)
    return Adapter(copy.name, method, copy.sites, tensors, base=copy.base, origin=copy.origin)


def _replaced(root: nn.Module, new: Adapter) -> None:
    """Put an adapter in the place of the attached one of its name; everything else stays as it was."""
    bank = bank_of(root)
    if new.name in bank.merged:
        raise UnsupportedError(f"adapter {new.name!r} is merged; unmerge it first.")
    old = bank.require(new.name)
    learns = any(parameter.requires_grad for parameter in old.parameters())
    dtypes = {name: tensor.dtype for name, tensor in old.named().items()}
    active, disabled, scales = list(bank.active), set(bank.disabled), dict(bank.scales)
    here = {s.path: {n: e[0].scale for n, e in s.edits.items()} for s in sites_of(root).values()}
    detach(root, new.name)
    try:
        made = attach(root, new, trainable=learns)
    except BaseException:
        attach(root, old, trainable=learns)
        raise
    bank = bank_of(root)
    bank.active, bank.disabled, bank.scales = active, disabled, scales
    for site in sites_of(root).values():
        if new.name in site.edits and new.name in here.get(site.path, {}):
            site.set_scale(new.name, here[site.path][new.name])
    for name, tensor in made.named().items():
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def _tell(config: Any, rank: int) -> None:
    """A configuration of the larger rank, at the same scalings."""

    def grown(alpha: float, old: int) -> float:
        ratio = rank / old
        found = alpha * (ratio**0.5 if config.use_rslora else ratio)
        return int(found) if found == int(found) else found

    alphas = {
        key: grown(config.alpha_pattern.get(key, config.lora_alpha), old)
        for key, old in config.rank_pattern.items()
    }
    alphas |= {
        key: grown(alpha, config.r)
        for key, alpha in config.alpha_pattern.items()
        if key not in alphas
    }
    config.lora_alpha = grown(config.lora_alpha, config.r)
    config.r = rank
    config.alpha_pattern = alphas
    config.rank_pattern = dict.fromkeys(config.rank_pattern, rank)
