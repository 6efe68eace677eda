"""Quantise a base while it is loaded: each weight is read, rounded and dropped before the next is read.

transformers loads a checkpoint tensor by tensor and lets a quantizer of a known name have each; this is ours. The peak
of memory is the quantised model and the tensor that is being rounded. The head, the embeddings and routers of experts
stay as they are, and so does what ``exempt`` names.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimtab.errors import ModelError, TargetError, suggest
from trimtab.frozen import Layer, view
from trimtab.frozen.blocks import BlocksLinear
from trimtab.frozen.experts import expert_parameters, followed
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.linear import Conv1DLayer, LinearLayer
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.models import packed, saved
from trimtab.models.families import HEADS
from trimtab.models.gguf_file import Blocks
from trimtab.models.mixed import Mixed, Mixer
from trimtab.models.stored import names, read

NAME = "trimtab"
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
    kept += [name for name in linear if name.split(".")[0] in HEADS]
    kept += _routers(model, linear)
    for one in exempt:
        pattern, _, other = one.partition("=")
        found = [name for name in weights if _matches(name, pattern)]
        if not found:
            raise TargetError(
                f"exempt: {pattern!r} matches no linear layer of {type(model).__name__}."
                f"{suggest(pattern, {name.rpartition('.')[2] for name in weights})}"
            )
        kept += [] if other else found
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


class Rounding:
    """Which weights of a model go into which format, and how they get there. ``formats`` are the formats by weight."""

    def __init__(
        self,
        model: PreTrainedModel,
        format: str,
        exempt: Sequence[str],
        average_bits: float | None = None,
    ) -> None:
        self._model = model
        self.formats = dict.fromkeys(sorted(targets(model, exempt)), format)
        chosen = set(self.formats)
        for pattern, _, other in (one.partition("=") for one in exempt if "=" in one):
            here = [n for n in self.formats if _matches(n.removesuffix(".weight"), pattern)]
            self.formats |= dict.fromkeys(here, other)
            chosen.difference_update(here)
        self._chosen = frozenset(chosen)
        self.mixer: Mixer | None = None
        if average_bits is not None:
            sizes = {name: model.get_parameter(name).numel() for name in chosen}
            self.mixer = Mixer(format, average_bits, sizes, partial(_put, model))

    def store(self, name: str, weight: Tensor | Blocks) -> None:
        """Put a weight in few bits, and what holds it into the model.

        Raises:
            ModelError: it has another shape than the model's, or values that no format holds.
        """
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if isinstance(weight, Blocks):
            dtype = module.get_parameter(leaf).dtype
            kept = BlocksLinear(weight.codes, weight.kind, _bias(module), dtype)
            _check_shape(path, kept, module)
            _put(self._model, path, kept)
            return
        wanted = module.get_parameter(leaf).shape
        if weight.shape != wanted:
            raise ModelError(
                f"{name}: the weight has shape {tuple(weight.shape)}, not {tuple(wanted)}."
            )
        try:
            self._store(name, path, leaf, module, weight)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None

    def _store(self, name: str, path: str, leaf: str, module: nn.Module, weight: Tensor) -> None:
        old, round_one = _dense(module), FORMATS[self.formats[name]]
        mixer = self.mixer if self.mixer is not None and name in self._chosen else None
        if old is not None:
            oriented, bias = old.orient(weight), _bias(module)
            if mixer is not None:
                mixer.add(name, path, oriented, bias)
            else:
                _put(self._model, path, round_one(oriented, bias))
            return
        experts = module if isinstance(module, LowBitExperts) else LowBitExperts(module)
        experts.pack(leaf, weight, round_one)
        if experts is not module:
            _put(self._model, path, experts)
        if mixer is not None:
            mixer.took(name, experts.bits_of(leaf))


def _bias(module: nn.Module) -> Tensor | None:
    return module._parameters.get("bias")


def _matches(name: str, pattern: str) -> bool:
    return _within(name, pattern) or fnmatch.fnmatchcase(name, pattern)


def _within(name: str, path: str) -> bool:
    """Whether a module is the one at a path, or at the end of one, or inside it."""
    return f".{path}." in f".{name}."


@torch.no_grad()
def rounded(
    model: PreTrainedModel, format: str, exempt: Sequence[str], average_bits: float | None = None
) -> Mixed | None:
    """Round the linear layers of a dense model in place, one by one."""
    rounding = Rounding(model, format, exempt, average_bits)
    for name in rounding.formats:
        rounding.store(name, model.get_parameter(name).data)
    return None if rounding.mixer is None else rounding.mixer.done()


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
                _check_shape(path, layer, old)
        except ModelError as error:  # transformers would bury it in a report
            self.hf_quantizer.problems.append(error)
            layer = nn.Identity()
        _put(kwargs["model"], path, layer)
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
            _put(model, path, experts)
        return {}


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of what a checkpoint in few bits has codes for."""
    layer = view(module)
    return (0, 0) if layer is None else (layer.out_features, layer.in_features)


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
