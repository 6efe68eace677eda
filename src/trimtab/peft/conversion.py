"""Any adapter that changes weights, as a plain LoRA: what servers and other libraries read.

A LoRA stays exact where the rank allows: one that began away from zero (PiSSA, OLoRA, …) becomes the plain one of
twice the rank. Any other change of weight becomes the nearest of the rank, by singular values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.bank import bank_of
from trimtab.adapt.factors import EMBEDDED, FACTORS, paired, stacked
from trimtab.adapt.files import save
from trimtab.errors import ConfigError, UnsupportedError
from trimtab.frozen.experts import ExpertLayer
from trimtab.frozen.layer import no_factors
from trimtab.methods.lora import LoRA
from trimtab.peft.changes import (
    Change,
    Factors,
    Rank,
    changes,
    decomposed,
    edited,
    edits_at,
    lora_of,
    trained,
)
from trimtab.peft.config import PeftConfig
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.find import configs_of, root_of
from trimtab.peft.weighted import config_of


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as a LoRA with a scaling of 1: its configuration, and its tensors by PEFT's names.

    Args:
        model: with the adapter attached; it is not changed.
        rank: of every layer; or, as a float up to 1, the share of the squared singular values that is kept, so that
            each layer gets the rank that it needs.
        progressbar: show how far it is.
        compile_kwargs: not supported; what takes the time is one decomposition of each layer.

    Raises:
        ConfigError: a rank that no layer, or not every layer, can have.
        NotMergeableError: the adapter is no change of weights.
    """
    made = converted(model, rank, adapter_name, progressbar, compile_kwargs)
    configs = configs_of(model)
    like = configs.get(adapter_name) or PeftConfig()
    config = config_of(made, like)
    if not isinstance(config, LoraConfig):
        raise AssertionError("a LoRA's configuration is LoRA's")
    prefix = _prefix(model)
    disk = {slot: name for method in made.methods for slot, name in method.disk.items()}
    state = {
        f"{prefix}{name.path}.{disk.get(name.slot, name.slot)}": tensor
        for name, tensor in made.named().items()
    }
    return config, state


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter as the LoRA of `convert_to_lora`, into a folder that PEFT and servers read."""
    made = converted(model, rank, adapter_name, progressbar, compile_kwargs)
    config = configs_of(model).get(adapter_name)
    if config is not None:
        made.origin = replace(
            made.origin,
            base_name=config.base_model_name_or_path or made.origin.base_name,
            task_type=config.task_type or made.origin.task_type,
        )
    save(made, Path(path), beside=True)


def converted(
    model: nn.Module,
    rank: float,
    name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Adapter:
    """An attached adapter as a free LoRA."""
    if compile_kwargs is not None:
        raise ConfigError("compile_kwargs is not supported by trimtab.peft; leave it out.")
    if isinstance(rank, bool) or not math.isfinite(rank) or rank <= 0:
        raise ConfigError(f"rank must be a number above 0, not {rank!r}.")
    if isinstance(rank, float) and rank > 1:
        raise ConfigError(
            f"rank={rank} is a float, and so the share of the change that is kept, at most 1; for a rank of "
            f"{int(rank)}, write {int(rank)}."
        )
    root = root_of(model)
    adapter = bank_of(root).require(name)
    places = list(edited(root, [name]))
    if not places:
        raise UnsupportedError(
            f"adapter {name!r} ({adapter.method.kind}) edits no layer, so it is no LoRA."
        )
    found = _each(root, name, adapter, rank)
    parts = list(track(found, "Converting to LoRA", total=len(places), disable=not progressbar))
    made = lora_of(root, name, parts, [adapter] if trained(adapter) else [])
    made.base = adapter.base
    return made


def _each(model: nn.Module, name: str, adapter: Adapter, rank: float) -> Iterator[Factors]:
    own = adapter.named()
    whole = bank_of(model).scales.get(name, 1.0)
    scales = {
        path: edit.scale * whole
        for site, path in edited(model, [name])
        for edit in edits_at(site, name, path)
    }
    for change in changes(model, [name]):
        method = _plain_lora(adapter, change.path)
        if method is not None and isinstance(rank, int) and method.plain_rank <= rank:
            made = _padded(change, method, own, rank)
            scale = scales[change.path]
            yield made if scale == 1.0 else replace(made, b=made.b * scale)
        else:
            yield _nearest(change, rank)


def _plain_lora(adapter: Adapter, path: str) -> LoRA | None:
    """The LoRA at a path, if it is all that acts there and its factors are used as they are."""
    here = [site for site in adapter.sites if site.path == path]
    method = adapter.methods[here[0].method].at(path)
    if len(here) != 1 or here[0].role or not isinstance(method, LoRA):
        return None
    return None if method.bits or method.lora_bias or method.rebased else method


def _padded(
    change: Change, method: LoRA, tensors: Mapping[TensorName, Tensor], rank: int
) -> Factors:
    """The factors themselves, with zeros up to the rank."""
    slots = EMBEDDED if change.layer.kind == "embedding" else FACTORS
    params = {
        short: tensors[TensorName(change.path, slot)].detach()
        for short, slot in zip(("A", "B", "A0", "B0"), slots, strict=True)
        if TensorName(change.path, slot) in tensors
    }
    a, b = method.whole(params)
    a, b = padded(a, b, method.plain_rank, rank)
    return Factors(change.path, change.layer, a, b)


def padded(a: Tensor, b: Tensor, rank: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Factors of a larger rank with the same product, for each expert and each group of a convolution."""
    extra = wanted - rank
    if stacked(a, b, rank):
        more_a = a.new_zeros(a.shape[0], extra, a.shape[2])
        more_b = b.new_zeros(*b.shape[:2], extra)
        return torch.cat([a, more_a], 1), torch.cat([b, more_b], 2)
    groups = paired(a, b, rank)[0].shape[0]
    if extra % groups:
        raise ConfigError(f"rank {wanted} is not a multiple of the convolution's {groups} groups.")
    rows = a.unflatten(0, (groups, -1))
    rows = torch.cat([rows, rows.new_zeros(groups, extra // groups, *rows.shape[2:])], 1)
    columns = b.new_zeros(b.shape[0], extra // groups, *b.shape[2:])
    return rows.flatten(0, 1), torch.cat([b, columns], 1)


def _nearest(change: Change, rank: float) -> Factors:
    weight, bias = change.weights[0], change.biases[0]
    if change.layer.kind == "norm":
        raise no_factors("norm")
    if isinstance(rank, int):
        experts = isinstance(change.layer, ExpertLayer)
        largest = min(weight.shape[1:] if experts else weight.flatten(1).shape)
        if rank > largest:
            raise ConfigError(
                f"{change.path} is of shape {tuple(weight.shape)}, so its change has no more than rank {largest}; "
                f"{rank} was asked for."
            )
    kept: Rank = rank if isinstance(rank, int) else (lambda values: _share(values, rank))
    made = decomposed(change.path, change.layer, weight, kept)
    return replace(made, bias=bias)


def _share(values: Tensor, share: float) -> int:
    """How many singular values it takes for that share of the sum of their squares; of several rows, the most."""
    energy = values.double().square().cumsum(-1)
    wanted = share * energy[..., -1:]
    return int((energy < wanted).sum(-1).max()) + 1


def _prefix(model: nn.Module) -> str:
    """What the names of the root's modules begin with in this model."""
    root = root_of(model)
    path = next(name for name, module in model.named_modules() if module is root)
    return f"{path}." if path else ""
