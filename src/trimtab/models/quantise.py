"""Quantise a base while it is loaded: each weight is read, rounded and dropped before the next is read.

transformers loads a checkpoint tensor by tensor and lets a quantizer of a known name have each; this is ours. The peak
of memory is the quantised model and the tensor that is being rounded. The head, the embeddings and routers of experts
stay as they are, and so does what ``exempt`` names.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimtab.errors import ModelError, TargetError, suggest
from trimtab.frozen import Layer, view
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.linear import Conv1DLayer, LinearLayer
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.models import saved
from trimtab.models.stored import PARTS, read

NAME = "trimtab"


def targets(model: PreTrainedModel, exempt: Sequence[str]) -> set[str]:
    """The linear layers that are stored in few bits.

    Raises:
        TargetError: an exemption matches nothing.
    """
    whole = (
        getattr(model, "_keep_in_fp32_modules", None) or ()
    )  # what the architecture itself wants wide
    kept = [name for name in (*HfQuantizer.get_modules_to_not_convert(model), *whole) if name]
    linear = [name for name, module in model.named_modules() if _dense(module) is not None]
    for pattern in exempt:
        found = [name for name in linear if _matches(name, pattern)]
        if not found:
            raise TargetError(
                f"exempt: {pattern!r} matches no linear layer of {type(model).__name__}."
                f"{suggest(pattern, {name.rpartition('.')[2] for name in linear})}"
            )
        kept += found
    return {name for name in linear if not any(_within(name, one) for one in kept)}


def _dense(module: nn.Module) -> Layer | None:
    """The view of a dense linear layer."""
    found = view(module)
    return found if isinstance(found, LinearLayer | Conv1DLayer) else None


def _round(module: nn.Module, weight: Tensor, format: str) -> LowBitLinear:
    """A layer like this one with this weight, in few bits."""
    old = _dense(module)
    if old is None:
        raise AssertionError("chosen because it is one")
    return FORMATS[format](old.orient(weight), module._parameters.get("bias"))


def _matches(name: str, pattern: str) -> bool:
    return _within(name, pattern) or fnmatch.fnmatchcase(name, pattern)


def _within(name: str, path: str) -> bool:
    """Whether a module is the one at a path, or at the end of one, or inside it."""
    return f".{path}." in f".{name}."


@torch.no_grad()
def rounded(model: PreTrainedModel, format: str, exempt: Sequence[str]) -> list[str]:
    """Round the linear layers of a dense model in place, one by one; the formats of the new layers."""
    kinds = []
    for name in sorted(targets(model, exempt)):
        old: Any = model.get_submodule(name)
        new = _round(old, old.weight, format)
        _put(model, name, new)
        kinds.append(new.kind)
    return kinds


@register_quantization_config(NAME)
class StorageConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How weights are to be stored: the format, and which modules are left alone (names, ends of names, or globs);
    or how those of a checkpoint of bitsandbytes are stored already (see `trimtab.models.stored`)."""

    def __init__(
        self,
        format: str = "nf4",
        exempt: Sequence[str] = (),
        stored: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = NAME
        self.format = format
        self.exempt = list(exempt)
        self.stored = stored

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> StorageConfig | None:
        """What the ``quantization_config`` of a checkpoint says, if Trimtab reads it itself."""
        if config.get("quant_method") == NAME:
            return cls(stored=NAME)
        if config.get("quant_method") != "bitsandbytes":
            return None
        stored = "8bit" if config.get("load_in_8bit") else "4bit"
        return cls(exempt=config.get("llm_int8_skip_modules") or (), stored=stored)


@register_quantizer(NAME)
class Quantiser(HfQuantizer):  # type: ignore[misc]
    """Puts a layer in few bits in the place of each linear one as its weight arrives."""

    quantization_config: StorageConfig
    requires_calibration = False

    def __init__(self, quantization_config: StorageConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.problems: list[ModelError] = []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.targets = targets(model, self.quantization_config.exempt)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        path, name = param_name.rpartition(".")[::2]
        return name == "weight" and path in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self.quantization_config.format)

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        stored = self.quantization_config.stored
        if stored is None:
            return {}
        return {"weight": [*(saved.PARTS if stored == NAME else PARTS[stored])]}

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Take}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Take(ConversionOps):  # type: ignore[misc]
    """Take one weight as it is stored and put the layer that holds it into the model."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.hf_quantizer = (
            quantiser  # by which transformers knows that nothing is to be cast before
        )
        self.stored = str(quantiser.quantization_config.stored)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Take:
        """transformers copies an operation for each weight; all report to the one quantizer."""
        return self

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        parts = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        name = kwargs["full_layer_name"]
        if len(parts) == 1 and parts["weight"].is_floating_point():
            # a norm, an embedding, or a layer that was left alone
            return {"weight": parts["weight"].to(kwargs["model"].get_parameter(name).dtype)}
        path = name.rpartition(".")[0]
        old = kwargs["model"].get_submodule(path)
        kwargs["missing_keys"].discard(f"{path}.weight")
        layer: nn.Module
        try:
            dtype = kwargs["model"].dtype
            if self.stored == NAME:
                shape = (old.out_features, old.in_features)
                layer = saved.read(path, parts, shape, old.bias, dtype)
            else:
                layer = read(self.stored, path, parts, old.bias, dtype)
        except ModelError as error:  # transformers would bury it in a report
            self.hf_quantizer.problems.append(error)
            layer = nn.Identity()
        _put(kwargs["model"], path, layer)
        return {}


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    layer._is_hf_initialized = True  # type: ignore[assignment]
    layer.train(model.get_submodule(path).training)
    parent, _, child = path.rpartition(".")
    model.get_submodule(parent).add_module(child, layer)


class _Round(ConversionOps):  # type: ignore[misc]
    """Round one weight and put the layer that holds it into the model."""

    def __init__(self, format: str) -> None:
        self.format = format

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        weight: Tensor = value[0] if isinstance(value, list) else value
        model: nn.Module = kwargs["model"]
        path = name.rpartition(".")[0]
        _put(model, path, _round(model.get_submodule(path), weight, self.format))
        kwargs["missing_keys"].discard(name)
        return {}  # it is in its place already
