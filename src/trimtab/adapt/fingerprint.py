"""Which base an adapter was made for.

The architecture is a hash over the model class and the names and shapes of its parameters. The source
of the weights is a handful of short hashes of samples of named tensors, rounded to bfloat16 so that
another dtype of the same weights is the same base; tensors that are stored in few bits are left out,
so that another storage format is a note and not another base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.frozen import view
from trimtab.frozen.experts import StoredExperts
from trimtab.frozen.linear import hidden

_SAMPLED_TENSORS = 24
_SAMPLED_VALUES = 512


@dataclass(frozen=True)
class Fingerprint:
    """``architecture`` is one hash; ``weights`` maps some tensors' names to the hash of a sample."""

    model_class: str
    architecture: str
    weights: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_class": self.model_class,
            "architecture": self.architecture,
            "weights": dict(self.weights),
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


def fingerprint(root: nn.Module, modules: Mapping[str, nn.Module]) -> Fingerprint:
    """Of the bare model ``root`` with these modules by canonical path."""
    lines = [type(root).__name__]
    tensors: dict[str, Tensor] = {}
    for path, module in modules.items():
        layer = view(module)
        if layer is not None:
            lines.append(f"{path} {layer.kind} {layer.out_features}x{layer.in_features}")
        own = {n: p for n, p in module._parameters.items() if p is not None}
        if layer is None:
            shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
            if isinstance(module, StoredExperts):
                shapes = module.shapes
            lines += [f"{path}.{name} {shape}" for name, shape in shapes.items()]
        for name, parameter in own.items():
            if dense(parameter) and parameter.device.type != "meta":
                tensors[f"{path}.{name}" if path else name] = parameter
    names = sorted(tensors)
    step = max(len(names) // _SAMPLED_TENSORS, 1)
    sampled = {name: sample(tensors[name]) for name in names[::step]}
    architecture = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
    return Fingerprint(type(root).__name__, architecture, sampled)


def dense(tensor: Tensor) -> bool:
    """Whether a tensor holds plain values, not codes of a few bits."""
    return tensor.is_floating_point() and tensor.element_size() >= 2 and not hidden(tensor)


@torch.no_grad()
def sample(tensor: Tensor) -> str:
    """Short hash of up to 512 values, evenly spaced, as bfloat16."""
    flat = tensor.detach().reshape(-1)
    chosen = flat[:: max(flat.numel() // _SAMPLED_VALUES, 1)][:_SAMPLED_VALUES]
    raw = chosen.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]
