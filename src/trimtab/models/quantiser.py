"""Store a base in few bits while it is loaded: each weight is read, rounded and dropped before the next is read.

transformers loads a checkpoint tensor by tensor and lets a quantizer of a known name have each; this is ours, also for
weights that are in few bits where they lie. The peak of memory is the quantised model and the tensor that is being
rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimtab.errors import ModelError
from trimtab.frozen import view
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.models import packed, saved
from trimtab.models.gguf_file import Blocks
from trimtab.models.quantise import Rounding, check_shape, put
from trimtab.models.storage import BLOCKS
from trimtab.models.stored import names, read

NAME = "trimtab"


@register_quantization_config(NAME)
class StorageConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How weights are to be stored: the format, and which modules are left alone (names, ends of names, or globs);
    or how those of a checkpoint are stored already (see `trimtab.models.stored`) and what else that takes to read."""

    def __init__(
        self,
        format: str = "nf4",
        exempt: Sequence[str] = (),
        stored: str | None = None,
        average_bits: float | None = None,
        facts: Mapping[str, Any] = MappingProxyType({}),
        **_: Any,
    ) -> None:
        self.quant_method = NAME
        self.format = format
        self.average_bits = average_bits
        self.exempt = list(exempt)
        self.stored = stored
        self.facts = dict(facts)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> StorageConfig | None:
        """What the ``quantization_config`` of a checkpoint says, if Trimtab reads it itself."""
        method = config.get("quant_method")
        if method == NAME:
            return cls(stored=NAME)
        if method != "bitsandbytes":
            known = packed.facts(config)
            return None if known is None else cls(stored=str(method), facts=known)
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
        asked = self.quantization_config
        if asked.stored is None:
            self.rounding = Rounding(model, asked.format, asked.exempt, asked.average_bits)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return self.quantization_config.stored is None and param_name in self.rounding.formats

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        stored = self.quantization_config.stored
        if stored is None:
            return []
        if stored != NAME:
            return [WeightConverter([*names(stored)], "weight", [_Take(self)])]
        return [
            WeightConverter([*saved.PARTS], "weight", [_Take(self)]),
            WeightConverter([*saved.STACKS], "", [_TakeExperts(self)]),
        ]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def forget(model: PreTrainedModel) -> None:
    """Let a model be saved as one that was never read from few bits: transformers would undo that reading first."""
    done = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        one
        for one in done
        if not any(isinstance(step, _Take) for step in getattr(one, "operations", ()))
    ]


class _Take(ConversionOps):  # type: ignore[misc]
    """Take one weight as it is stored and put the layer that holds it into the model."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.hf_quantizer = (
            quantiser  # by which transformers knows that nothing is to be cast before
        )
        self.stored = str(quantiser.quantization_config.stored)
        self.facts = quantiser.quantization_config.facts

    def __deepcopy__(self, memo: dict[int, Any]) -> _Take:
        """transformers copies an operation for each weight; all report to the one quantizer."""
        return self

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        parts = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        name = kwargs["full_layer_name"]
        only = parts["weight"] if parts.keys() == {"weight"} else None
        if only is not None and only.is_floating_point() and only.element_size() > 1:
            # a norm, an embedding, or a layer that was left alone
            return {"weight": only.to(kwargs["model"].get_parameter(name).dtype)}
        path = name.rpartition(".")[0]
        old = kwargs["model"].get_submodule(path)
        kwargs["missing_keys"].discard(f"{path}.weight")
        layer: nn.Module
        try:
            dtype = kwargs["model"].dtype
            if self.stored == NAME:
                layer = saved.read(path, parts, _matrix_shape(old), old.bias, dtype)
            else:
                layer = read(self.stored, path, parts, old.bias, dtype, self.facts)
                check_shape(path, layer, old)
        except ModelError as error:  # transformers would bury it in a report
            self.hf_quantizer.problems.append(error)
            layer = nn.Identity()
        put(kwargs["model"], path, layer)
        return {}


class _TakeExperts(_Take):
    """The same for all experts of one parameter."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        parts = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        model, full = kwargs["model"], kwargs["full_layer_name"]
        path, _, name = full.rpartition(".")
        kwargs["missing_keys"].discard(full)
        module = model.get_submodule(path)
        experts = module if isinstance(module, LowBitExperts) else LowBitExperts(module)
        try:
            saved.read_stacked(path, name, parts, experts, model.dtype)
        except ModelError as error:
            self.hf_quantizer.problems.append(error)
            return {}
        if experts is not module:
            put(model, path, experts)
        return {}


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of what a checkpoint in few bits has codes for."""
    layer = view(module)
    return (0, 0) if layer is None else (layer.out_features, layer.in_features)


class _Round(ConversionOps):  # type: ignore[misc]
    """Round one weight and put the layer that holds it into the model."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        left = {}
        for name, value in input_dict.items():
            if name not in self.quantiser.rounding.formats:
                left[name] = value  # it came out of the same tensor of the file
                continue
            weight = value[0] if isinstance(value, list) else value
            format = self.quantiser.quantization_config.format
            if format == BLOCKS and not isinstance(weight, Blocks):
                left[name] = (
                    weight  # the file has it in plain numbers, or in blocks of another kind
                )
                continue
            try:
                self.quantiser.rounding.store(name, weight)
            except ModelError as error:  # transformers would bury it in a report
                self.quantiser.problems.append(error)
            kwargs["missing_keys"].discard(name)
        return left
