"""Which weights of a base are stored in few bits, and how each is rounded and put into the model.

The head, the embeddings and routers of experts stay as they are, and so does what ``exempt`` names. A weight is rounded
as it is read (`trimtab.models.quantiser`), or all are in a model that is there.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from trimtab.errors import ModelError, TargetError, suggest
from trimtab.frozen import Layer, view
from trimtab.frozen.blocks import BlocksLinear
from trimtab.frozen.experts import expert_parameters, followed
from trimtab.frozen.formats import maker
from trimtab.frozen.linear import Conv1DLayer, LinearLayer
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.models.families import HEADS
from trimtab.models.gguf_file import Blocks
from trimtab.models.mixed import Mixed, Mixer

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
            self.mixer = Mixer(format, average_bits, sizes, partial(put, model))

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
            check_shape(path, kept, module)
            put(self._model, path, kept)
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
        old, storage = _dense(module), self.formats[name]
        mixer = self.mixer if self.mixer is not None and name in self._chosen else None
        if old is not None:
            oriented, bias = old.orient(weight), _bias(module)
            if mixer is not None:
                mixer.add(name, path, oriented, bias)
            else:
                put(self._model, path, maker(storage)(oriented, bias))
            return
        experts = module if isinstance(module, LowBitExperts) else LowBitExperts(module)
        experts.pack(leaf, weight, maker(storage, plain=True))
        if experts is not module:
            put(self._model, path, experts)
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


def check_shape(path: str, new: LowBitLinear, old: nn.Module) -> None:
    """Raise `ModelError` where a layer is of another size than the one in whose place it comes."""
    wanted = view(old)
    if wanted is None or wanted.shape != (new.out_features, new.in_features):
        shape = "no linear layer" if wanted is None else str(wanted.shape)
        raise ModelError(
            f"{path}: its stored tensors do not fit together or belong to another model (they make a weight of "
            f"{(new.out_features, new.in_features)}; the model has {shape})."
        )


def put(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one at a path."""
    layer._is_hf_initialized = True  # type: ignore[assignment]
    layer.train(model.get_submodule(path).training)
    parent, _, child = path.rpartition(".")
    model.get_submodule(parent).add_module(child, layer)
