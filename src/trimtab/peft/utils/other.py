"""Preparing a model for training, and small helpers, by the names of ``peft.utils.other``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.slots import Slot
from trimtab.errors import ConfigError, ModelError, TargetError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a model and recompute activations in backward, whether it is quantised or not.

    No weight is converted: PEFT makes every half-precision weight of a quantised model fp32, and all of a plain
    model. Adapters are kept in fp32 here whatever the base is, so nothing needs that.

    Args:
        model: of transformers; it is changed and handed back.
        use_gradient_checkpointing: recompute activations.
        gradient_checkpointing_kwargs: of ``torch.utils.checkpoint``; ``use_reentrant`` is False unless it says so.
        auto_clear_cache: of no effect, because nothing is converted.

    Raises:
        ModelError: the model cannot recompute activations.
    """
    model.requires_grad_(False)
    if not use_gradient_checkpointing:
        return model
    options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
    # the name of transformers from 5.19 on, and that of releases before
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    found = [name for name in names if hasattr(type(model), name)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} cannot recompute activations: it is no model of transformers. Pass "
            "use_gradient_checkpointing=False."
        )
    enable: Callable[..., None] = getattr(model, found[0])
    enable(options)
    if options["use_reentrant"]:  # such a checkpoint has no gradients unless its input has
        model.enable_input_require_grads()  # type: ignore[operator]
    return model


@torch.no_grad()
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights of a base to a half precision, and adapters to fp32, in place.

    Quantised weights stay as they are. (PEFT casts adapters that are not being trained to half precision too.)
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype must be torch.float16 or torch.bfloat16, not {dtype}.")
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Slot)
        for parameter in module._parameters.values()
    }
    for parameter in model.parameters():
        if parameter.is_floating_point():
            kept = id(parameter) in own or parameter.requires_grad
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels (B, T) -> the decoder's input: one to the right, the start token first, padding where labels were -100.

    Raises:
        ConfigError: there is no token for padding.
    """
    if pad_token_id is None:
        raise ConfigError("shift_tokens_right needs pad_token_id; set it in the model's config.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def infer_device() -> str:
    """The kind of device that this machine computes fastest on."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else "cpu"


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The policy by which FSDP of torch's first kind shards a model with adapters: block by block.

    Blocks are what the model calls ``_no_split_modules``, or those that ``FSDP_TRANSFORMER_CLS_TO_WRAP`` names. The
    tensors of adapters are sharded with the block that they are in: their modules are never called by themselves.
    ``use_orig_params=True`` is needed, and saving happens inside ``FSDP.summon_full_params(model)``. FSDP2 needs no
    policy; ``fully_shard`` each block.

    Raises:
        TargetError: the model names no blocks, or lacks those that are named.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    named = {n.strip() for n in given.split(",") if n.strip()} if given else set()
    if not named:
        named = {n for m in model.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    classes = {type(module) for module in model.modules() if type(module).__name__ in named}
    if not classes:
        raise TargetError(
            f"{type(model).__name__} has no block to shard by: {sorted(named) or 'it names none'}. Set "
            "FSDP_TRANSFORMER_CLS_TO_WRAP to the name of the class of its blocks."
        )
    return partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
