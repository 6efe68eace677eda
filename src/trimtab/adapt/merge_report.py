"""Merging into another dtype or into few bits, and what it costs, measured.

    W' = the merged weight in fp32,   Ŵ' = what is stored of it,   W = the base's

    error   ‖Ŵ' − W'‖ / ‖W'‖          of a layer: how far the stored weight is off
    lost    ‖Ŵ' − W'‖ / ‖W' − W‖      of a layer: the same as a share of what the adapters changed
    gap     ‖l̂ − l‖ / ‖l‖             of the outputs for a batch: l with the adapters attached, l̂ merged
    share   ‖l̂ − l‖ / ‖l − l₀‖        the same as a share of what the adapters do, l₀ without them

An edit is small beside its weight, often smaller than a step of a format of few bits: rounding again can then undo it,
while the weight is hardly off at all. So what is refused is decided by ``share``, or ``lost`` where there is no batch.
A change that a format holds as it is (`LowBitLinear.shifted`: QA-LoRA's groups) is merged exactly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapt.acting import using
from trimtab.adapt.merge import copied, densify, fold, kept_bias
from trimtab.adapt.tree import Children, bare_modules, canonical
from trimtab.errors import ConfigError, MergeError, UnknownNameError, suggest
from trimtab.frozen import Layer, view
from trimtab.frozen.experts import expert_parameters
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.lowbit import LowBitLayer, LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.models.quantise import targets

TOLERANCE = 0.5
"""Most of what the adapters do that merging may undo."""
BASE, DENSE = "base", "dense"
Batch = Mapping[str, Any] | Tensor
"""One call of a model: its keyword arguments, or its one tensor."""


@dataclass(frozen=True)
class Stored:
    """One layer as it was stored. ``lost`` is None where the adapters do not change it."""

    path: str
    storage: str
    error: float
    lost: float | None
    exact: bool = False


@dataclass(frozen=True)
class Gap:
    """How far the outputs for a batch are off, and as a share of what the adapters do to them."""

    gap: float
    share: float


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged model, and what merging cost. ``layers`` are those that were edited or stored anew."""

    model: nn.Module
    layers: tuple[Stored, ...]
    gap: Gap | None

    @property
    def worst(self) -> Stored | None:
        """The layer that is furthest off."""
        return max(self.layers, key=lambda layer: layer.error, default=None)

    @property
    def lost(self) -> float:
        """The largest share of an edit that was lost in one layer."""
        return max((layer.lost for layer in self.layers if layer.lost is not None), default=0.0)

    def lines(self) -> list[str]:
        """What to tell a person."""
        worst = self.worst
        if worst is None:
            return ["nothing was stored anew"]
        kinds = {layer.storage for layer in self.layers}
        mean = math.sqrt(sum(layer.error**2 for layer in self.layers) / len(self.layers))
        exact = sum(layer.exact for layer in self.layers)
        told = [
            f"{len(self.layers)} layers in {', '.join(sorted(kinds))}"
            + (f", {exact} of them exactly" if exact else ""),
            f"weights off by {_percent(mean)} (rms), {_percent(worst.error)} at most: {worst.path}",
            f"of an edit, at most {_percent(self.lost)} is lost in one layer",
        ]
        if self.gap is not None:
            told.append(
                f"outputs off by {_percent(self.gap.gap)}, {_percent(self.gap.share)} of what the adapter does"
            )
        return told


def merge_with_report(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    storage: str = DENSE,
    batch: Batch | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Merged:
    """Merge adapters into a new model, store that as asked for, and measure what it costs.

    Args:
        model: with adapters attached; it is not changed.
        names: one adapter, or several in the order in which they nest.
        dtype: of the new model; by default that of the base's computation.
        storage: ``dense``; ``base``: each layer as the base stores it; or a format (``nf4``, ``int8``, …) for all
            linear layers that `trimtab.load` would store so.
        batch: one call of the model; the gap of the outputs is measured on it.
        tolerance: the largest share of what the adapters do that may be lost.
        force: merge, however much is lost.

    Raises:
        NotMergeableError: an adapter's edit is not affine.
        UnknownNameError: there is no such storage.
        MergeError: more than ``tolerance`` is lost.
    """
    check_storage(storage)
    new = copied(model, names)
    return fold_with_report(
        new,
        names,
        dtype=dtype,
        storage=storage,
        batch=batch,
        tolerance=tolerance,
        force=force,
    )


@torch.no_grad()
def fold_with_report(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    storage: str = DENSE,
    batch: Batch | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Merged:
    """As `merge_with_report`, but uses the model up."""
    check_storage(storage)
    outputs = [] if batch is None else [_output(model, batch, who) for who in (names, None)]
    writer = _Writer(dtype, storage, _targets(model, storage))
    experts = {p: m for p, m in bare_modules(model).items() if isinstance(m, LowBitExperts)}
    fold(model, names, write=writer.merged)
    _the_rest(model, writer, experts)
    if storage == DENSE:
        densify(model)
    if dtype is not None:
        model.to(dtype)
    gap = None
    if batch is not None:
        with_them, without = outputs
        gap = _gap(_called(model, _cast(batch, dtype)), with_them, without)
    merged = Merged(model, tuple(writer.layers.values()), gap)
    if not force:
        _check(merged, tolerance)
    return merged


def check_storage(storage: str) -> None:
    """Raise `UnknownNameError` for a storage that there is not."""
    known = (DENSE, BASE, *FORMATS)
    if storage not in known:
        hint = suggest(storage, known) or f" Known: {', '.join(known)}."
        raise UnknownNameError(f"unknown storage {storage!r}.{hint}")


class _Writer:
    """Stores layers, and measures each."""

    def __init__(
        self, dtype: torch.dtype | None, storage: str, targets: Collection[str] | None
    ) -> None:
        self.dtype = dtype
        self.storage = storage
        self.targets = targets
        self.layers: dict[str, Stored] = {}

    def merged(self, path: str, layer: Layer, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """See `trimtab.adapt.merge.Write`."""
        change = weight - layer.wide(layer.dense())
        dtype = self.dtype or layer.dtype
        new, exact = self._stored(path, layer, weight, kept_bias(layer, bias, dtype), change)
        self._measure(path, new, weight, change, exact)
        return new

    def again(self, path: str, layer: Layer) -> nn.Module:
        """A layer that no adapter changed."""
        weight, bias = layer.wide(layer.dense()), layer.bias()
        new, _ = self._stored(path, layer, weight, bias, None)
        self._measure(path, new, weight, None, False)
        return new

    def keeps(self, path: str, layer: Layer) -> bool:
        """Whether a layer without edits stays as it is."""
        if isinstance(layer, LowBitLayer):
            return self.storage in (BASE, layer.module.kind) and self._format(path) != DENSE
        return self._format(path) in (DENSE, BASE)

    def _format(self, path: str) -> str:
        return self.storage if self.targets is None or path in self.targets else DENSE

    def _stored(
        self, path: str, layer: Layer, weight: Tensor, bias: Tensor | None, change: Tensor | None
    ) -> tuple[nn.Module, bool]:
        """The new layer, and whether it holds the change exactly."""
        dtype, format = self.dtype or layer.dtype, self._format(path)
        own = layer.module if isinstance(layer, LowBitLayer) else None
        if format == DENSE or (format == BASE and own is None):
            return layer.write(weight.to(dtype).contiguous().clone(), bias), False
        new: LowBitLinear | None = None
        exact = False
        if own is not None and format in (BASE, own.kind):
            new = None if change is None else own.shifted(change, bias)
            new, exact = new or own.like(weight, bias), new is not None
        else:
            new = FORMATS[format](weight, bias)
        new.compute_dtype = dtype
        return new, exact

    def experts(self, path: str, module: nn.Module, old: LowBitExperts | None) -> nn.Module:
        """Experts in the format asked for; ``old`` is what they were where any of them were in few bits."""
        was = {} if old is None else old.formats
        held = module.formats if isinstance(module, LowBitExperts) else {}
        for name in expert_parameters(module):
            whole = f"{path}.{name}"
            kind = was.get(name, DENSE) if self.storage == BASE else self._format(whole)
            if kind in (DENSE, held.get(name)):
                continue
            if isinstance(module, LowBitExperts) and name in held:
                module = module.with_dense({name: module.dense_parameter(name)})
            value = module.get_parameter(name).data
            like = old.round_like(name) if old and was.get(name) == kind else FORMATS[kind]
            packed = module if isinstance(module, LowBitExperts) else LowBitExperts(module)
            packed.pack(name, value, like)
            off = _norm(packed.dense_parameter(name) - value)
            edited = old is not None and name in was and name not in held
            change = _norm(value - old.dense_parameter(name)) if old and edited else None
            lost = None if change is None else _ratio(off, change)
            self.layers[whole] = Stored(whole, kind, _ratio(off, _norm(value)), lost)
            module = packed
        return module

    def _measure(
        self, path: str, new: nn.Module, weight: Tensor, change: Tensor | None, exact: bool
    ) -> None:
        now = view(new)
        if now is None:
            raise AssertionError("a layer writes a layer")
        off = _norm(now.dense().to(weight.dtype) - weight)
        edit = None if change is None or not bool(change.any()) else _norm(change)
        lost = None if edit is None else _ratio(off, edit)
        error = _ratio(off, _norm(weight))
        kind = now.module.kind if isinstance(now, LowBitLayer) else _name(now.dtype)
        self.layers[path] = Stored(path, kind, error, lost, exact)


def _targets(model: nn.Module, storage: str) -> Collection[str] | None:
    """The layers that take the format: those that are in few bits now, or would be; None: each as it says."""
    if storage in (DENSE, BASE):
        return None
    bare = bare_modules(model)
    stored = [path for path, module in bare.items() if isinstance(module, LowBitLinear)]
    for path, module in bare.items():
        if isinstance(module, LowBitExperts):
            stored += [f"{path}.{name}" for name in module.formats]
    if stored:
        return stored
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"storage={storage!r}: which layers of {type(model).__name__} take it is known for models of transformers "
            "alone; merge into dense weights."
        )
    return {canonical(name).removesuffix(".weight") for name in targets(model, ())}


def _the_rest(model: nn.Module, writer: _Writer, experts: Mapping[str, LowBitExperts]) -> None:
    """Store what no adapter edits as the rest is, and experts, which merging makes dense."""
    children = Children(model)
    for path, module in list(model.named_modules()):
        layer = view(module)
        new: nn.Module
        if expert_parameters(module):
            new = writer.experts(path, module, experts.get(path))
        elif (
            path in writer.layers
            or layer is None
            or layer.kind != "linear"
            or writer.keeps(path, layer)
        ):
            continue
        else:
            new = writer.again(path, layer)
        if new is not module:
            children.replace(module, new.train(module.training).requires_grad_(False))


def _check(merged: Merged, tolerance: float) -> None:
    lost = merged.lost if merged.gap is None else merged.gap.share
    if not lost <= tolerance:  # NaN too
        what = "weights" if merged.gap is None else "outputs"
        raise MergeError(
            f"storing the merged model undoes {lost:.0%} of what the adapter does to the {what}, more than the "
            f"{tolerance:.0%} that are allowed ({'; '.join(merged.lines())}). Merge into dense weights, or into more "
            "bits; or keep the adapter beside the base; or force it."
        )


def _output(model: nn.Module, batch: Batch, who: Any) -> Tensor:
    with using(model, who):
        return _called(model, batch)


def _called(model: nn.Module, batch: Batch) -> Tensor:
    """What the model answers: its logits, or the first tensor that it gives."""
    was = model.training
    model.eval()
    try:
        out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        model.train(was)
    if isinstance(out, Mapping):
        out = out["logits"] if "logits" in out else next(iter(out.values()))
    while not isinstance(out, Tensor):
        out = out[0]
    return out.float()


def _cast(batch: Batch, dtype: torch.dtype | None) -> Batch:
    """A batch whose floating inputs are as the merged model takes them."""
    if dtype is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    return {n: _cast(v, dtype) if isinstance(v, Tensor) else v for n, v in batch.items()}


def _gap(merged: Tensor, with_them: Tensor, without: Tensor) -> Gap:
    off = _norm(merged - with_them)
    effect = _norm(with_them - without)
    return Gap(_ratio(off, _norm(with_them)), _ratio(off, effect))


def _norm(values: Tensor) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values, dtype=wide)


def _ratio(off: Tensor, whole: Tensor) -> float:
    """0 where nothing is off, whatever it is measured by."""
    if not bool(off > 0):
        return 0.0 if bool(off == 0) else math.nan
    return float(off / whole) if bool(whole > 0) else math.inf


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or share == 0 else f"{100 * share:.0e}%"
