"""Initialisations of LoRA that begin from data: EVA, LoRA-GA and CorDA, called as PEFT's users call them.

model = get_peft_model(model, LoraConfig(init_lora_weights="eva"))
initialize_lora_eva_weights(model, dataloader)

preprocess_loraga(model, config, train_step)          # config.init_lora_weights is "lora_ga"
preprocess_corda(model, config, run_model)            # or "corda"
model = get_peft_model(model, config)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.attach import attach, detach
from trimtab.errors import ConfigError, UnsupportedError
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.configs.lora_parts import CordaConfig
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
    tuner = model.base_model
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
    lora_config.batches = _calls(model, train_step, "preprocess_loraga: train_step")


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Keep what ``run_model`` calls the model (or ``hooked_model``) with; `get_peft_model` then takes the covariances
    of its layers' inputs from it. The base stays as it is.

    Raises:
        ConfigError: the configuration is not of ``init_lora_weights="corda"``, or the model was not called.
        UnsupportedError: files of covariances are named.
    """
    if str(lora_config.init_lora_weights).lower() != "corda":
        raise ConfigError("preprocess_corda is for init_lora_weights='corda'.")
    given = lora_config.corda_config
    if isinstance(given, CordaConfig) and (given.cache_file or given.covariance_file):
        raise UnsupportedError(
            "preprocess_corda: cache_file and covariance_file are pickles in PEFT, and nothing is unpickled here; "
            "leave them out of CordaConfig, and let run_model run the model."
        )
    if run_model is None:
        raise ConfigError("preprocess_corda needs run_model: covariances are not read from files.")
    watched = model if hooked_model is None else hooked_model
    lora_config.batches = _calls(watched, run_model, "preprocess_corda: run_model")


def _calls(model: nn.Module, run: Callable[[], object], who: str) -> list[Any]:
    """What a function calls a model with; the gradients of its weights are what they were before."""
    calls: list[Any] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if args and (kwargs or len(args) > 1):
            raise ConfigError(f"{who} calls the model with several arguments that have no names.")
        if args:
            calls.append(args[0].detach() if isinstance(args[0], Tensor) else args[0])
            return
        calls.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    before = {parameter: parameter.grad for parameter in model.parameters()}
    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
        for parameter, gradient in before.items():
            parameter.grad = gradient
    if not calls:
        raise ConfigError(f"{who} did not call the model.")
    return calls


def _on(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Mapping):
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        else:
            yield batch
