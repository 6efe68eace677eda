"""LoftQ of a base in few bits, called as PEFT's users call it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.plan import layer_at
from trimtab.adapt.tree import anatomy_of
from trimtab.adapt.variant import Variant
from trimtab.errors import ConfigError
from trimtab.inits.loftq import LoftQ
from trimtab.models.originals import Originals
from trimtab.peft.errors import PeftWarning
from trimtab.peft.model import PeftModel


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let a LoRA on a base in few bits begin as what rounding lost, from the dense weights on disk.

    Args:
        peft_model: a model whose base is stored in few bits.
        model_path: the safetensors file of the dense weights, or their folder; by default where the base came from.
        adapter_name: the LoRA.
        callback: called with the model and a layer's name after each layer; where it says False, the layer's factors
            are what they were.

    Raises:
        ConfigError: the adapter is no LoRA, or none of its layers is stored in few bits.
        ModelError: the dense weights are not there.
    """
    tuner, base = peft_model.tuner, peft_model.get_base_model()
    adapter, anatomy = tuner.require(adapter_name), anatomy_of(base)
    source = model_path or getattr(anatomy.config, "_name_or_path", "") or "this base"
    read, init = Originals(source, getattr(base, "base_model_prefix", "")), LoftQ(scale="peft")
    scales, generator = set(), torch.Generator().manual_seed(0)
    for site in adapter.sites:
        method = adapter.methods[site.method].at(site.path)
        layer = layer_at(anatomy, site.path)
        if not layer.rounded or not isinstance(method, LowRank) or site.role in BIASES:
            continue
        if isinstance(method, Variant) and method.starts != "anywhere":
            raise ConfigError(
                f"adapter {adapter_name!r}: {method.kind} begins {method.starts}, and so not as LoftQ."
            )
        scales.add(method.scaling)
        seen = {"original": read.weight(site.path)}
        made = init.factors(layer.dense().float(), method.rank, 1.0, seen, generator)
        held = adapter.at_site(site.path)
        factors = [held["lora_A.weight"], held["lora_B.weight"]]
        before = [factor.clone() for factor in factors]
        for factor, value in zip(factors, made, strict=True):
            factor.copy_(value)
        if callback is not None and not callback(peft_model, site.path):
            for factor, value in zip(factors, before, strict=True):
                factor.copy_(value)
    if not scales:
        raise ConfigError(
            f"adapter {adapter_name!r} has no LoRA on a layer that is stored in few bits; load the base so "
            "(trimtab.load(..., storage='nf4')), or begin with init_lora_weights='loftq'."
        )
    if scales != {1.0}:
        warnings.warn(
            f"replace_lora_weights_loftq lets B A be what rounding lost, as PEFT does, and the adapter adds "
            f"{max(scales):g} · B A. Set lora_alpha to r.",
            category=PeftWarning,
            stacklevel=2,
        )
