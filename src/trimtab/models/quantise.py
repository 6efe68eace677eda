"""Quantise a base while it is loaded: each weight is read, rounded and dropped before the next is read.

transformers loads a checkpoint tensor by tensor and lets a quantizer of a known name have each; this is ours. The peak
of memory is the quantised model and the tensor that is being rounded. The head, the embeddings and routers of experts
stay as they are, and so does what ``exempt`` names.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimtab.frozen.eightbit import Fp8Linear, Int8Linear
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.lowbit import LowBitLinear

Format = Literal["nf4", "fp4", "int8", "fp8"]
NAME = "trimtab"
FORMATS: Mapping[str, Callable[[Tensor, Tensor | None], LowBitLinear]] = {
    "nf4": partial(FourBitLinear.of, kind="nf4"),
    "fp4": partial(FourBitLinear.of, kind="fp4"),
    "int8": Int8Linear.of,
    "fp8": Fp8Linear.of,
}
"""Name -> how a layer in that format is made of a dense weight and a bias."""


@register_quantization_config(NAME)
class StorageConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How weights are stored: the format, and which modules are left alone (names, ends of names, or globs)."""

    def __init__(self, format: Format = "nf4", exempt: Sequence[str] = (), **_: Any) -> None:
        self.quant_method = NAME
        self.format = format
        self.exempt = list(exempt)


@register_quantizer(NAME)
class Quantiser(HfQuantizer):  # type: ignore[misc]
    """Puts a layer in few bits in the place of each linear one as its weight arrives."""

    quantization_config: StorageConfig
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        kept = set(self.get_modules_to_not_convert(model))
        self.targets = {
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and not self._exempt(name, kept)
        }

    def _exempt(self, name: str, kept: set[str]) -> bool:
        ends = {name.rpartition(".")[2], name}
        if any(name == one or name.startswith(f"{one}.") for one in kept):
            return True
        return any(
            pattern in ends or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)
            for pattern in self.quantization_config.exempt
        )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        path, name = param_name.rpartition(".")[::2]
        return name == "weight" and path in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self.quantization_config.format)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Round(ConversionOps):  # type: ignore[misc]
    """Round one weight and put the layer that holds it into the model."""

    def __init__(self, format: Format) -> None:
        self.format = format

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        weight: Tensor = value[0] if isinstance(value, list) else value
        model: nn.Module = kwargs["model"]
        path = name.rpartition(".")[0]
        old = model.get_submodule(path)
        new = FORMATS[self.format](weight, old.bias)  # type: ignore[arg-type]
        new._is_hf_initialized = True  # type: ignore[assignment]
        parent, _, child = path.rpartition(".")
        model.get_submodule(parent).add_module(child, new)
        kwargs["missing_keys"].discard(name)
        return {}  # it is in its place already
