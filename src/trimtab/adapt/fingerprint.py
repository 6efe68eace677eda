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

from torch import Tensor, nn

from trimtab.frozen import Layer, view
from trimtab.frozen.experts import StoredExperts, expert_parameters
from trimtab.frozen.linear import LinearMap, hidden
from trimtab.frozen.loftq import NAME as LOFTQ
from trimtab.frozen.lowbit import LowBit, LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.frozen.sample import sample, sample_codes
from trimtab.models.mixed import BITS

_SAMPLED_TENSORS = 24
_ALWAYS_DENSE = 12


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
        return f"there {self._in_words()}, here {other._in_words()}"

    def _in_words(self) -> str:
        if self.storage is None:
            return "all layers are dense"
        exempt = f" but for {', '.join(self.exempt)}" if self.exempt else ""
        return f"linear layers are in {self.storage}{exempt}"


def fingerprint(root: nn.Module, modules: Mapping[str, nn.Module]) -> Fingerprint:
    """Of the bare model ``root`` with these modules by canonical path."""
    lines = [type(root).__name__]
    tensors: dict[str, Tensor] = {}
    formats: dict[str, str] = {}  # of weights that may be in few bits; empty: dense
    for path, module in modules.items():
        layer = view(module)
        if layer is not None:
            lines.append(f"{path} {layer.kind} {layer.out_features}x{layer.in_features}")
        formats |= _formats(path, module, layer)
        own = {n: p for n, p in module._parameters.items() if p is not None}
        if layer is None:
            shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
            if isinstance(module, StoredExperts):
                shapes = module.shapes
            lines += [f"{path}.{name} {shape}" for name, shape in shapes.items()]
        for name, parameter in own.items():
            if dense(parameter) and parameter.device.type != "meta":
                tensors[_name(path, name)] = parameter
    sampled: dict[str, str] = {}
    for name in _chosen({**tensors, **formats}, formats):
        if name in tensors:
            sampled[name] = sample(tensors[name])
        elif formats[name]:
            key, found = _stored(name, modules)
            sampled |= {key: found} if found else {}
    architecture = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
    return Fingerprint(type(root).__name__, architecture, sampled, *_storage(formats))


def _formats(path: str, module: nn.Module, layer: Layer | None) -> dict[str, str]:
    """The weights of a module that may be in few bits, and the format that they are in; that of a hidden one is not
    known."""
    if isinstance(layer, LinearMap):
        return {_name(path, "weight"): module.storage if isinstance(module, LowBitLinear) else ""}
    packed = module.formats if isinstance(module, LowBitExperts) else {}
    return {_name(path, n): packed.get(n, "") for n in expert_parameters(module)}


def _stored(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """What a weight in few bits is called (its name, format and dtype), and the sample of its codes; or of what LoftQ
    made them of, whose codes differ a little between machines. Empty on the meta device."""
    path, _, leaf = name.rpartition(".")
    module = modules[path]
    if not isinstance(module, LowBit):
        raise AssertionError("its format is known")
    if isinstance(module, LowBitLinear) and module.was:
        return f"{name}:{LOFTQ}", module.was
    codes = module.get_buffer(f"{leaf}_codes" if isinstance(module, LowBitExperts) else "codes")
    dtype = str(module.compute_dtype).removeprefix("torch.")
    return f"{name}:{module.kind}:{dtype}", "" if codes.is_meta else sample_codes(codes)


def storage_of(modules: Mapping[str, nn.Module]) -> tuple[str | None, tuple[str, ...]]:
    """How the linear layers among these modules are stored: see `Fingerprint`."""
    formats: dict[str, str] = {}
    for path, module in modules.items():
        formats |= _formats(path, module, view(module))
    return _storage(formats)


def _name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _chosen(tensors: Collection[str], stored: Collection[str]) -> list[str]:
    """The names to sample: evenly among all, and evenly among those that are dense in every storage."""
    names = sorted(tensors)
    dense_ones = [name for name in names if name not in stored]
    chosen = {*names[:: max(len(names) // _SAMPLED_TENSORS, 1)]}
    chosen |= {*dense_ones[:: max(len(dense_ones) // _ALWAYS_DENSE, 1)]}
    return sorted(chosen)


def _storage(formats: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The format that most weights in few bits are in (one of four bits, if any are), and those in another, as
    `trimtab.load` takes them: by the last segment of their modules' paths where all of that name are alike."""
    counts = Counter(kind for kind in formats.values() if kind)
    if not counts:
        return None, ()
    most = min(counts, key=lambda kind: (kind not in BITS, -counts[kind]))
    named = {name.removesuffix(".weight"): kind for name, kind in formats.items()}
    alike: dict[str, set[str]] = {}
    for path, kind in named.items():
        alike.setdefault(path.rpartition(".")[2], set()).add(kind)
    apart = set()
    for path, kind in named.items():
        if kind != most:
            leaf = path.rpartition(".")[2]
            apart.add((leaf if len(alike[leaf]) == 1 else path) + (f"={kind}" if kind else ""))
    return most, tuple(sorted(apart))


def dense(tensor: Tensor) -> bool:
    """Whether a tensor holds plain values, not codes of a few bits."""
    return tensor.is_floating_point() and tensor.element_size() >= 2 and not hidden(tensor)
