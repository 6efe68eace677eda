"""Initialisations of LoRA that begin from data: EVA, LoRA-GA and CorDA, called as PEFT's users call them.

model = get_peft_model(model, LoraConfig(init_lora_weights="eva"))
initialize_lora_eva_weights(model, dataloader)

preprocess_loraga(model, config, train_step)          # config.init_lora_weights is "lora_ga"
preprocess_corda(model, config, run_model)            # or "corda"
model = get_peft_model(model, config)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.contract import Method
from trimtab.adapt.disk import read_tensors
from trimtab.adapt.lowrank import LowRank
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import ConfigError, FileFormatError, UnsupportedError, suggest
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.configs.lora_parts import CordaConfig
from trimtab.peft.find import tuner_of
from trimtab.peft.model import PeftModel

ROOT = "base_model.model."
Forward = Callable[[nn.Module, Any], Any]
_TEMPORARY = "trimtab-eva"


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Forward | None = None,
    prepare_model_inputs_fn: None = None,
    prepare_layer_inputs_fn: None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The directions (rank, width) with which EVA would begin, by the path of the layer; the model stays as it is.

    Args:
        model: a `PeftModel`, or a bare model with a ``peft_config``.
        dataloader: batches that the model is called with, or that ``forward_fn(model, batch)`` calls it with.

    Raises:
        ConfigError: the configuration is not of ``init_lora_weights="eva"``.
        DataError: the batches show too little of a layer.
    """
    _refuse(prepare_model_inputs_fn, prepare_layer_inputs_fn)
    tuner = tuner_of(model)
    base = model if tuner is None else tuner.model
    if peft_config is None and tuner is not None:
        tuner.require(adapter_name)
        peft_config = tuner.peft_config.get(adapter_name)  # type: ignore[assignment]
    config = _of_eva(peft_config, adapter_name).copied()
    config.batches = _batches(base, dataloader, forward_fn)
    attach(base, config.method(base), _TEMPORARY, batches=config.batches)
    made = detach(base, _TEMPORARY)
    root = "" if tuner is None else ROOT
    return {
        f"{root}{name.path}": tensor
        for name, tensor in made.named().items()
        if name.slot == "lora_A.weight"
    }


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward | None = None,
    prepare_model_inputs_fn: None = None,
    prepare_layer_inputs_fn: None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> PeftModel:
    """Begin a LoRA as EVA does, from batches, or from `get_eva_state_dict`. Make the optimizer after this.

    Raises:
        ConfigError: the adapter is no LoRA of ``init_lora_weights="eva"``, or there is no data.
        DataError: the batches show too little of a layer.
    """
    _refuse(prepare_model_inputs_fn, prepare_layer_inputs_fn)
    tuner = model.tuner
    old = tuner.require(adapter_name)
    config = _of_eva(tuner.peft_config[adapter_name], adapter_name)
    if (dataloader is None) == (eva_state_dict is None):
        raise ConfigError("initialize_lora_eva_weights needs a dataloader, or an eva_state_dict.")
    active = list(tuner.active_adapters)
    tuner.unmerge_adapter()
    base = model.get_base_model()
    config.batches = [] if dataloader is None else _batches(base, dataloader, forward_fn)
    detach(base, adapter_name)
    try:
        seed = int(torch.randint(2**31, ()))
        method = config.method(base)
        if eva_state_dict is None:
            made = attach(base, method, adapter_name, seed=seed, batches=config.batches)
        else:
            made = _with_directions(base, method, adapter_name, seed, eva_state_dict)
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


def _of_eva(config: Any, name: str) -> LoraConfig:
    if not isinstance(config, LoraConfig) or str(config.init_lora_weights).lower() != "eva":
        raise ConfigError(f"adapter {name!r} is not of init_lora_weights='eva'.")
    return config


def _refuse(*functions: object) -> None:
    if any(function is not None for function in functions):
        raise ConfigError(
            "prepare_model_inputs_fn and prepare_layer_inputs_fn are not called: the attention_mask and the labels of "
            "a batch say which positions count. Change the batches instead."
        )


def _with_directions(
    base: nn.Module, method: Method, name: str, seed: int, directions: Mapping[str, Tensor]
) -> Adapter:
    """A LoRA that begins with these directions, where there are any."""
    if not isinstance(method, LowRank):
        raise ConfigError("eva_state_dict is for a LoRA alone, without trainable_token_indices.")
    own = {path.removeprefix(ROOT): value for path, value in directions.items()}
    wanted = [place.path for place in method.place(anatomy_of(base))]
    foreign = [path for path in own if path not in wanted]
    if foreign or not own:
        known = suggest(foreign[0], wanted) if foreign else " It is empty."
        raise ConfigError(f"eva_state_dict: {foreign[:1]} is no target of adapter {name!r}.{known}")
    ranks = {path: own[path].shape[0] if path in own else 0 for path in wanted}
    adapter = attach(base, method.replace(init="default").ranked(ranks), name, seed=seed)
    with torch.no_grad():
        for path, value in own.items():
            adapter.at_site(path)["lora_A.weight"].copy_(value)
    return adapter


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | Path | None = None,
) -> None:
    """Keep what ``train_step`` calls the model with; `get_peft_model` then takes the gradients from it.

    The model's own loss is meant, so each call has to have labels. The base's weights and gradients stay as they are.
    What is kept is written to ``cache_file`` (safetensors); if that is there, it is read, and no step is taken.

    Raises:
        ConfigError: the configuration is not of ``init_lora_weights="lora_ga"``, or the model was not called.
    """
    if str(lora_config.init_lora_weights).lower() != "lora_ga":
        raise ConfigError("preprocess_loraga is for init_lora_weights='lora_ga'.")
    if cache_file is not None and Path(cache_file).is_file():
        lora_config.batches = _read_calls(Path(cache_file), next(model.parameters()).device)
        return
    calls = _calls(model, train_step, "preprocess_loraga: train_step")
    lora_config.batches = calls
    if cache_file is not None:
        _write_calls(calls, Path(cache_file))


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


def _write_calls(calls: Sequence[Any], file: Path) -> None:
    """An argument without a name has the empty one."""
    named = {
        f"{number}.{name}": value
        for number, call in enumerate(calls)
        for name, value in (call if isinstance(call, Mapping) else {"": call}).items()
    }
    tensors = {k: v.contiguous().clone() for k, v in named.items() if isinstance(v, Tensor)}
    others = {k: v for k, v in named.items() if not isinstance(v, Tensor)}
    try:
        metadata = {"format": "pt", "others": json.dumps(others)}
    except TypeError as error:
        raise ConfigError(
            f"cache_file: an argument of the model cannot be written: {error}."
        ) from None
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.new")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, file)


def _read_calls(file: Path, device: torch.device) -> list[Any]:
    calls: dict[int, dict[str, Any]] = {}
    tensors = read_tensors(file)
    with safe_open(file, framework="pt") as opened:
        others = json.loads((opened.metadata() or {}).get("others", "null"))
    if not isinstance(others, dict):
        raise FileFormatError(f"{file} was not written by preprocess_loraga; remove it.")
    for key, value in [*tensors.items(), *others.items()]:
        number, _, name = key.partition(".")
        calls.setdefault(int(number), {})[name] = (
            value.to(device) if isinstance(value, Tensor) else value
        )
    return [calls[number].get("", calls[number]) for number in sorted(calls)]


class _Called(Exception):
    """What a forward function has called the model with."""


def _batches(base: nn.Module, batches: Iterable[Any], forward: Forward | None) -> Iterator[Any]:
    """What the model is to be called with, on its device."""
    device = next(base.parameters()).device
    if forward is None:
        yield from _on(device, batches)
        return

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise ConfigError("forward_fn calls the model with arguments that have no names.")
        raise _Called(kwargs)

    for batch in batches:
        handle = base.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        found: tuple[Any, ...] = ()
        try:
            forward(base, batch)
        except _Called as called:
            found = called.args
        finally:
            handle.remove()
        if not found:
            raise ConfigError("forward_fn did not call the model.")
        yield from _on(device, found)


def _on(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Mapping):
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        else:
            yield batch
