"""What is attached to a model, layer by layer and in all, in the words of PEFT's status functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.apart import Apart
from trimtab.adapt.multihead import MultiheadSite
from trimtab.adapt.site import ExpertsSite, LayerSite, SiteBase
from trimtab.adapt.whole_module import WholeModule
from trimtab.errors import AttachError
from trimtab.peft.changes import trained
from trimtab.peft.config import PeftConfig
from trimtab.peft.find import tuner_of
from trimtab.peft.types import on_disk

T = TypeVar("T")
Irregular = Literal["irregular"]

_BACKENDS = {
    "Linear8bitLt": "bnb 8bit",
    "Linear4bit": "bnb 4bit",
    "HQQLinear": "hqq",
    "AffineQuantizedTensor": "torchao",
}
"""Class of a quantised layer, or of its weight -> what PEFT calls the backend."""


@dataclass
class TunerLayerStatus:
    """One layer with adapters. ``devices`` and ``requires_grad`` are by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A model with adapters. A fact that differs from layer to layer is ``"irregular"``."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The layers that adapters edit, in the order of the model.

    Names are those in the tuner of a `trimtab.peft.PeftModel`, so that they begin with ``model.``; in any other
    model, they are its own.

    Raises:
        AttachError: no adapter edits a layer of it.
    """
    tuner = tuner_of(model)
    found = []
    for name, module in (model if tuner is None else tuner).named_modules():
        if not isinstance(module, SiteBase) or isinstance(module, Apart | WholeModule):
            continue
        bank = module.bank
        active = [n for n in bank.active if n not in bank.disabled]
        enabled = bool(active)
        if tuner is not None:
            active, enabled = list(tuner.active_adapters), not tuner.off
        for path, holders in _layers(module, name):
            adapters = {adapter.name: adapter for adapter in holders}
            found.append(
                TunerLayerStatus(
                    name=path,
                    module_type=_type(module, holders[0]),
                    enabled=enabled,
                    active_adapters=list(active),
                    merged_adapters=[n for n in bank.merged if n in adapters],
                    requires_grad={n: _learns(a, module) for n, a in adapters.items()},
                    available_adapters=sorted(adapters),
                    devices={n: _devices(a, module) for n, a in adapters.items()},
                    quantization_backend=_backend(module),
                )
            )
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no layers that adapters edit. A prompt or a prefix edits none; otherwise "
            "attach an adapter first."
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The same for the whole model.

    Raises:
        AttachError: no adapter edits a layer of it.
    """
    from trimtab.peft.model import PeftModel, count_values

    layers = get_layer_status(model)
    face = model if isinstance(model, PeftModel) else None
    configs = {} if face is None else face.peft_config
    base = model if face is None else face.get_base_model()
    known = face is not None or isinstance(model, PreTrainedModel)
    learnt, every = count_values(model)
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(
        name in layer.available_adapters and name not in layer.merged_adapters
        for layer in layers
        for name in merged
    )
    available = sorted({name for layer in layers for name in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(base).__name__ if known else "other",
        adapter_model_type="None" if face is None else _tuner_name(configs),
        peft_types={name: on_disk(config.peft_type) for name, config in configs.items()},
        trainable_params=learnt,
        total_params=every,
        num_adapter_layers=len(layers),
        enabled=_regular([layer.enabled for layer in layers]),
        active_adapters=_regular([layer.active_adapters for layer in layers]),
        merged_adapters="irregular" if partly else merged,
        requires_grad={
            name: _regular([x.requires_grad[name] for x in layers if name in x.requires_grad])
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({kind for layer in layers for kind in layer.devices.get(name, ())})
            for name in available
        },
        quantization_backend=_regular([layer.quantization_backend for layer in layers]),
    )


def _layers(site: SiteBase, name: str) -> list[tuple[str, list[Adapter]]]:
    """The layers at a site, each with the adapters that edit it: of experts, each parameter is one."""
    attached = {n: edits for n, edits in site.edits.items() if n in site.bank.adapters}
    paths = dict.fromkeys(edit.path for edits in attached.values() for edit in edits)
    found = []
    for path in paths:
        names = [n for n, edits in attached.items() if any(e.path == path for e in edits)]
        own = f"{name}.{path.rpartition('.')[2]}" if isinstance(site, ExpertsSite) else name
        found.append((own, [site.bank.require(n) for n in names]))
    return found


def _type(site: SiteBase, adapter: Adapter) -> str:
    """``lora.Linear``: PEFT's name of the method, and the class of the layer."""
    path = site.path
    if path in {spec.path for spec in trained(adapter)}:
        return "ModulesToSaveWrapper"
    method = adapter.method.members[0]
    layer = type(site.frozen).__name__
    plain = isinstance(site, LayerSite) and not isinstance(site, MultiheadSite)
    if plain and site.layer.kind == "linear":
        layer = "Linear"
    if method.peft_type == "LN_TUNING":
        layer = "LNTuningLayer"
    return (
        layer
        if method.peft_type == "IA3"
        else f"{(method.peft_type or method.kind).lower()}.{layer}"
    )


def _learns(adapter: Adapter, site: SiteBase) -> bool | Irregular:
    fixed = adapter.fixed
    return _regular(
        [
            bool(tensor.requires_grad)
            for name, tensor in adapter.named().items()
            if _inside(name.path, site) and isinstance(tensor, nn.Parameter) and name not in fixed
        ]
    )


def _devices(adapter: Adapter, site: SiteBase) -> list[str]:
    return sorted({t.device.type for n, t in adapter.named().items() if _inside(n.path, site)})


def _inside(path: str, site: SiteBase) -> bool:
    return path == site.path or path.startswith(f"{site.path}.")


def _backend(site: SiteBase) -> str | None:
    weight = site.frozen._parameters.get("weight")
    for kind in (type(site.frozen), type(weight), type(getattr(weight, "data", None))):
        if kind.__name__ in _BACKENDS:
            return _BACKENDS[kind.__name__]
    return None


def _tuner_name(configs: Mapping[str, PeftConfig]) -> str:
    """``LoraModel``, as PEFT's tuner of that configuration is called."""
    names = {type(config).__name__.removesuffix("Config") for config in configs.values()}
    return f"{names.pop()}Model" if len(names) == 1 else "MixedModel"


def _regular(values: Sequence[T]) -> T | Irregular:
    return values[0] if all(value == values[0] for value in values) else "irregular"
