"""Quantise a base while it is loaded: each weight is read, rounded and dropped before the next is read.

transformers loads a checkpoint tensor by tensor and lets a quantizer of a known name have each; this is ours. The peak
of memory is the quantised model and the tensor that is being rounded. The head, the embeddings and routers of experts
stay as they are, and so does what ``exempt`` names.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
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
from trimtab.frozen.blocks import BlocksLinear
from trimtab.frozen.eightbit import Fp8Linear, Int8Linear
from trimtab.frozen.experts import expert_parameters, followed
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.linear import Conv1DLayer, LinearLayer
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.models import packed
from trimtab.models.gguf_file import Blocks
from trimtab.models.stored import names, read

NAME = "trimtab"
FORMATS: Mapping[str, Callable[[Tensor, Tensor | None], LowBitLinear]] = {
    "nf4": partial(FourBitLinear.of, kind="nf4"),
    "fp4": partial(FourBitLinear.of, kind="fp4"),
    "int8": Int8Linear.of,
    "fp8": Fp8Linear.of,
}
"""Name -> how a layer in that format is made of a dense weight and a bias."""
BLOCKS = "gguf"
"""The format that leaves the weights of a GGUF file in their blocks."""
_EXPERTS = re.compile(r"(^|\.)experts$")


def targets(model: PreTrainedModel, exempt: Sequence[str]) -> set[str]:
    """The weights that are stored in few bits, by name: those of linear layers, and 3-D parameters of experts.

    Raises:
        TargetError: an exemption matches nothing.
    """
    whole = (
        getattr(model, "_keep_in_fp32_modules", None) or ()
    )  # what the architecture itself wants wide
    kept = [name for name in (*HfQuantizer.get_modules_to_not_convert(model), *whole) if name]
    linear = {n: f"{n}.weight" for n, module in model.named_modules() if _dense(module) is not None}
    weights = {**linear, **{name: name for name in _experts(model)}}
    kept += _routers(model, linear)
    for pattern in exempt:
        found = [name for name in weights if _matches(name, pattern)]
        if not found:
            raise TargetError(
                f"exempt: {pattern!r} matches no linear layer of {type(model).__name__}."
                f"{suggest(pattern, {name.rpartition('.')[2] for name in weights})}"
            )
        kept += found
    _tell_of_wide_experts(model, [*weights, *kept, *exempt])
    return {w for name, w in weights.items() if not any(_within(name, one) for one in kept)}


def _tell_of_wide_experts(model: nn.Module, known: Sequence[str]) -> None:
    """Warn of experts that are not stored in few bits although nobody exempted them."""
    wide = {
        f"{path}.{name}": parameter.numel()
        for path, module in model.named_modules()
        if _EXPERTS.search(path)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    left = {n: c for n, c in wide.items() if not any(_matches(n, one) for one in known)}
    if left:
        warnings.warn(
            f"{len(left)} parameters of experts ({sum(left.values())} weights), e.g. {min(left)!r}, stay as they are: "
            f"how {type(model).__name__} runs them is not known to Trimtab. Its other layers are stored in few bits.",
            stacklevel=2,
        )


def _experts(model: nn.Module) -> list[str]:
    """Parameters of experts that Trimtab can run."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in expert_parameters(module)
        if not isinstance(module, LowBitExperts) and followed(module)
    ]


def _routers(model: nn.Module, linear: Iterable[str]) -> list[str]:
    """Linear layers that choose or weigh experts: small, and every error of theirs sends tokens elsewhere."""
    mixtures = {
        path.rpartition(".")[0] for path, _ in model.named_modules() if _EXPERTS.search(path)
    }
    found = []
    for name in linear:
        parent, _, leaf = name.rpartition(".")
        beside = parent in mixtures and "gate" in leaf and "proj" not in leaf
        if beside or "router" in leaf or parent.rpartition(".")[2] == "router":
            found.append(name)
    return found


def _dense(module: nn.Module) -> Layer | None:
    """The view of a dense linear layer."""
    found = view(module)
    return found if isinstance(found, LinearLayer | Conv1DLayer) else None


def _store(model: nn.Module, name: str, weight: Tensor | Blocks, format: str) -> str:
    """Put a weight of the model in few bits, and what holds it into the model; the kind it is then of.

    Raises:
        ModelError: it has another shape than the model's.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(weight, Blocks):
        kept = BlocksLinear(
            weight.codes, weight.kind, _bias(module), module.get_parameter(leaf).dtype
        )
        _check_shape(path, kept, module)
        _put(model, path, kept)
        return kept.kind
    wanted = module.get_parameter(leaf).shape
    if weight.shape != wanted:
        raise ModelError(
            f"{name}: the weight has shape {tuple(weight.shape)}, not {tuple(wanted)}."
        )
    old = _dense(module)
    if old is not None:
        new = FORMATS[format](old.orient(weight), _bias(module))
        _put(model, path, new)
        return new.kind
    experts = module if isinstance(module, LowBitExperts) else LowBitExperts(module)
    experts.pack(leaf, weight, FORMATS[format])
    if experts is not module:
        _put(model, path, experts)
    return experts.kind


def _bias(module: nn.Module) -> Tensor | None:
    return module._parameters.get("bias")


def _matches(name: str, pattern: str) -> bool:
    return _within(name, pattern) or fnmatch.fnmatchcase(name, pattern)


def _within(name: str, path: str) -> bool:
    """Whether a module is the one at a path, or at the end of one, or inside it."""
    return f".{path}." in f".{name}."


@torch.no_grad()
def rounded(model: PreTrainedModel, format: str, exempt: Sequence[str]) -> list[str]:
    """Round the linear layers of a dense model in place, one by one; the formats of the new layers."""
    found = sorted(targets(model, exempt))
    return [_store(model, name, model.get_parameter(name).data, format) for name in found]


@register_quantization_config(NAME)
class StorageConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How weights are to be stored: the format, and which modules are left alone (names, ends of names, or globs);
    or how those of a checkpoint are stored already (see `trimtab.models.stored`) and what else that takes to read."""

    def __init__(
        self,
        format: str = "nf4",
        exempt: Sequence[str] = (),
        stored: str | None = None,
        facts: Mapping[str, Any] = MappingProxyType({}),
        **_: Any,
    ) -> None:
        self.quant_method = NAME
        self.format = format
        self.exempt = list(exempt)
        self.stored = stored
        self.facts = dict(facts)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> StorageConfig | None:
        """What the ``quantization_config`` of a checkpoint says, if Trimtab reads it itself."""
        method = config.get("quant_method")
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
        self.targets = targets(model, self.quantization_config.exempt)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        stored = self.quantization_config.stored
        return {} if stored is None else {"weight": [*names(stored)]}

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
            layer = read(self.stored, path, parts, old.bias, kwargs["model"].dtype, self.facts)
            _check_shape(path, layer, old)
        except ModelError as error:  # transformers would bury it in a report
            self.hf_quantizer.problems.append(error)
            layer = nn.Identity()
        _put(kwargs["model"], path, layer)
        return {}


def _check_shape(path: str, new: LowBitLinear, old: nn.Module) -> None:
    wanted = view(old)
    if wanted is None or wanted.shape != (new.out_features, new.in_features):
        shape = "no linear layer" if wanted is None else str(wanted.shape)
        raise ModelError(
            f"{path}: its stored tensors do not fit together or belong to another model (they make a weight of "
            f"{(new.out_features, new.in_features)}; the model has {shape})."
        )


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    layer._is_hf_initialized = True  # type: ignore[assignment]
    layer.train(model.get_submodule(path).training)
    parent, _, child = path.rpartition(".")
    model.get_submodule(parent).add_module(child, layer)


class _Round(ConversionOps):  # type: ignore[misc]
    """Round one weight and put the layer that holds it into the model."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        left = {}
        for name, value in input_dict.items():
            if name not in self.quantiser.targets:
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
                _store(kwargs["model"], name, weight, format)
            except ModelError as error:  # transformers would bury it in a report
                self.quantiser.problems.append(error)
            kwargs["missing_keys"].discard(name)
        return left
