"""Initialisations of LoRA that begin from data: EVA and LoRA-GA, called as PEFT's users call them.

model = get_peft_model(model, LoraConfig(init_lora_weights="eva"))
initialize_lora_eva_weights(model, dataloader)

preprocess_loraga(model, config, train_step)          # config.init_lora_weights is "lora_ga"
model = get_peft_model(model, config)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.attach import attach, detach
from trimtab.errors import ConfigError
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.model import PeftModel


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    *,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> PeftModel:
    """Begin a LoRA as EVA does, from batches that the model is called with. Make the optimizer after this.

    Raises:
        ConfigError: the adapter is no LoRA of ``init_lora_weights="eva"``, or there is no data.
        DataError: the batches show too little of a layer.
    """
    tuner = model.tuner
    old, config = tuner.require(adapter_name), tuner.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or str(config.init_lora_weights).lower() != "eva":
        raise ConfigError(f"adapter {adapter_name!r} is not of init_lora_weights='eva'.")
    if dataloader is None or eva_state_dict is not None:
        raise ConfigError(
            "initialize_lora_eva_weights needs a dataloader; eva_state_dict is not read."
        )
    active = list(tuner.active_adapters)
    tuner.unmerge_adapter()
    base = model.get_base_model()
    config.batches = _on(next(base.parameters()).device, dataloader)
    detach(base, adapter_name)
    try:
        seed = int(torch.randint(2**31, ()))
        method = config.method(base)
        made = attach(base, method, adapter_name, seed=seed, batches=config.batches)
    except BaseException:
        attach(base, old)
        raise
    finally:
        config.batches = None
        tuner.set_adapter(active)
    fields = dict(made.method)
    config.rank_pattern = dict(fields["rank_pattern"])
    config.alpha_pattern = dict(fields["alpha_pattern"])
    return model


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], object]
) -> None:
    """Keep what ``train_step`` calls the model with; `get_peft_model` then takes the gradients from it.

    The model's own loss is meant, so each call has to have labels. The base's weights and gradients stay as they are.

    Raises:
        ConfigError: the configuration is not of ``init_lora_weights="lora_ga"``, or the model was not called.
    """
    if str(lora_config.init_lora_weights).lower() != "lora_ga":
        raise ConfigError("preprocess_loraga is for init_lora_weights='lora_ga'.")
    calls: list[dict[str, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if args:
            raise ConfigError(
                "preprocess_loraga: train_step calls the model with arguments that have no names."
            )
        calls.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    before = {parameter: parameter.grad for parameter in model.parameters()}
    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        train_step()
    finally:
        handle.remove()
        for parameter, gradient in before.items():
            parameter.grad = gradient
    if not calls:
        raise ConfigError("preprocess_loraga: train_step did not call the model.")
    lora_config.batches = calls


def _on(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Mapping):
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        else:
            yield batch
