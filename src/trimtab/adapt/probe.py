"""Looking at a model with adapters: sites that nothing reaches, and the bare model's own tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.bank import bank_of
from trimtab.adapt.tree import bare_modules
from trimtab.errors import (
    AttachError,
)


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
