"""Which base an adapter was made for.

The architecture is a hash over the model class and the names and shapes of its parameters. The source of the weights
is a handful of short hashes of samples of named tensors, rounded to bfloat16 so that another dtype of the same weights
is the same base. Which tensors are sampled does not depend on how they are stored. Codes of few bits are hashed too,
under a name that says the format and the dtype that they were rounded from, and so are compared with their like alone;
of the tensors that are dense in every storage (norms, embeddings, biases) enough are sampled to compare any two
storages. Another storage of the same weights is the same base, and worth a warning: it computes with other weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.frozen import view
from trimtab.frozen.linear import LinearMap
from trimtab.frozen.lowbit import LowBitLinear

_SAMPLED_TENSORS = 24
_ALWAYS_DENSE = 12
_SAMPLED_VALUES = 512


@dataclass(frozen=True)
class Fingerprint:
    """``architecture`` is one hash; ``weights`` maps some tensors' names to the hash of a sample. ``storage`` is the
    format of most linear layers (None: they are dense), ``exempt`` names those that are in another, as `trimtab.load`
    takes it."""

    model_class: str
    architecture: str
    weights: Mapping[str, str]
    storage: str | None = None
    exempt: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_class": self.model_class,
            "architecture": self.architecture,
            "weights": dict(self.weights),
            "storage": self.storage,
            "exempt": list(self.exempt),
        }

    def mismatch(self, other: Fingerprint, apart: Collection[str] = ()) -> str:
        """Why ``other`` is another base than this one; empty when it is not. ``apart`` are names left out of it."""
        if self.architecture != other.architecture:
            return f"its architecture ({self.model_class}) has other parameters than this model's ({other.model_class})"
        common = [n for n in self.weights if n in other.weights and n not in apart]
        different = [name for name in common if self.weights[name] != other.weights[name]]
        if different:
            return f"the weights differ in {len(different)} of {len(common)} sampled tensors, e.g. {different[0]}"
        return ""

    def other_storage(self, other: Fingerprint) -> str:
        """How ``other`` is stored in other bits than this one; empty where it is not."""
        if (self.storage, self.exempt) == (other.storage, other.exempt):
            return ""
        return (
            f"{_in_words(self)}, and this one's {_in_words(other, self.storage == other.storage)}"
        )


def _in_words(one: Fingerprint, more: bool = True) -> str:
    kept = f" but for {', '.join(one.exempt)}" if one.exempt and more else ""
    return f"linear layers are in {one.storage}{kept}" if one.storage else "are dense"


def fingerprint(root: nn.Module, modules: Mapping[str, nn.Module]) -> Fingerprint:
    """Of the bare model ``root`` with these modules by canonical path."""
    lines = [type(root).__name__]
    tensors: dict[str, Tensor | None] = {}  # None: dense elsewhere, perhaps
    formats: dict[str, str] = {}
    for path, module in modules.items():
        layer = view(module)
        if layer is not None:
            lines.append(f"{path} {layer.kind} {layer.out_features}x{layer.in_features}")
        if isinstance(layer, LinearMap):
            tensors[_name(path, "weight")] = None
            formats[path] = module.kind if isinstance(module, LowBitLinear) else ""
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if layer is None:
                lines.append(f"{path}.{name} {tuple(parameter.shape)}")
            if dense(parameter) and parameter.device.type != "meta":
                tensors[_name(path, name)] = parameter
    sampled: dict[str, str] = {}
    for name in _chosen(tensors, {_name(path, "weight") for path in formats}):
        module = modules[name.rpartition(".")[0]]
        if (tensor := tensors[name]) is not None:
            sampled[name] = sample(tensor)
        elif isinstance(module, LowBitLinear):
            dtype = str(module.compute_dtype).removeprefix("torch.")
            sampled[f"{name}:{module.kind}:{dtype}"] = _stored_sample(module)
    architecture = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
    return Fingerprint(type(root).__name__, architecture, sampled, *_storage(formats))


def _name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _chosen(tensors: Collection[str], linear: Collection[str]) -> list[str]:
    """The names to sample: evenly among all, and evenly among those that are dense in every storage."""
    names = sorted(tensors)
    dense_ones = [name for name in names if name not in linear]
    chosen = {*names[:: max(len(names) // _SAMPLED_TENSORS, 1)]}
    chosen |= {*dense_ones[:: max(len(dense_ones) // _ALWAYS_DENSE, 1)]}
    return sorted(chosen)


def _storage(formats: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The format that most linear layers in few bits are in, and the layers in another, by what `trimtab.load` takes:
    the last segment of their paths where all of that name are alike."""
    counts = Counter(kind for kind in formats.values() if kind)
    if not counts:
        return None, ()
    most = max(counts, key=lambda kind: counts[kind])
    leaves: dict[str, set[str]] = {}
    for path, kind in formats.items():
        leaves.setdefault(path.rpartition(".")[2], set()).add(kind)
    apart = {
        (leaf if len(leaves[leaf := path.rpartition(".")[2]]) == 1 else path)
        + (f"={k}" if k else "")
        for path, k in formats.items()
        if k != most
    }
    return most, tuple(sorted(apart))


def _stored_sample(module: LowBitLinear) -> str:
    """Short hash of a sample of the codes; the same weight has the same on every machine."""
    codes = next(module.buffers()).reshape(-1).view(torch.uint8)
    chosen = codes[:: max(codes.numel() // _SAMPLED_VALUES, 1)][:_SAMPLED_VALUES]
    return hashlib.sha256(chosen.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def dense(tensor: Tensor) -> bool:
    """Whether a tensor holds plain values, not codes of a few bits."""
    return tensor.is_floating_point() and tensor.element_size() >= 2


@torch.no_grad()
def sample(tensor: Tensor) -> str:
    """Short hash of up to 512 values, evenly spaced, as bfloat16."""
    flat = tensor.detach().reshape(-1)
    chosen = flat[:: max(flat.numel() // _SAMPLED_VALUES, 1)][:_SAMPLED_VALUES]
    raw = chosen.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]
