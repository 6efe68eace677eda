"""The tensors of an adapter on one model: which are expected, their first values, and whether given ones fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.contract import Observed, Spec
from trimtab.adapt.disk import checksum
from trimtab.errors import (
    AttachError,
    TargetError,
)
from trimtab.frozen import Layer
from trimtab.models.anatomy import Anatomy

Specs = dict[tuple[int, str], dict[str, Spec]]
"""By (number of the site, or -1 - number of the method for its shared tensors; path): short name -> spec."""


def specs_of(
    adapter: Adapter,
    anatomy: Anatomy,
    layers: Mapping[str, Layer],
    observed: Mapping[str, Sequence[Observed]] = MappingProxyType({}),
) -> Specs:
    """What the methods of an adapter need at its sites and for all of them."""
    found: Specs = {}
    for number, site in enumerate(adapter.sites):
        method = adapter.methods[site.method].at(site.path)
        if site.path in anatomy.experts:
            each = anatomy.expert_layers(site.path)
            for layer, seen in zip(each, observed.get(site.path, ()), strict=False):
                layer.observed = seen
            specs = _stacked([method.tensors(layer, site.role) for layer in each])
        else:
            for seen in observed.get(site.path, ()):
                layers[site.path].observed = seen
            specs = method.tensors(layers[site.path], site.role)
        found[number, site.path] = specs
    for number, method in enumerate(adapter.methods):
        found[-1 - number, ""] = method.shared(anatomy, adapter.places(number))
    return found


def _stacked(each: Sequence[Mapping[str, Spec]]) -> dict[str, Spec]:
    """The same tensors for every expert, stacked; each starts as it would alone."""

    def stacked(short: str) -> Spec:
        specs = [of_expert[short] for of_expert in each]

        def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            return torch.stack([spec.init(spec.shape, generator) for spec in specs])

        first = specs[0]
        return Spec(first.name, (len(specs), *first.shape), init, first.cast, first.stored)

    return {short: stacked(short) for short in each[0]}


def initial_tensors(
    adapter: Adapter,
    specs: Mapping[tuple[int, str], Mapping[str, Spec]],
    layers: Mapping[str, Layer],
    seed: int,
    *,
    new: bool,
) -> dict[TensorName, Tensor]:
    """Initial values of a new adapter, or the checked tensors of a saved one, on their layers' devices.

    What is not stored is drawn again in either case, and ``adapter.drawn`` tells or checks its checksum.
    """
    expected = _expected(adapter, specs)
    devices = [layer.device for layer in layers.values()]
    default = devices[0] if devices else torch.device("cpu")
    given = adapter.named()
    rebuilt = {n for n in expected if n.slot in adapter.origin.rebuilt} - set(given)
    wanted = {n: s for n, s in expected.items() if s.stored and n not in rebuilt}
    if not new:
        _same_tensors(adapter, wanted, given)
    made: dict[TensorName, Tensor] = {}
    for tensor_name, spec in expected.items():
        layer = layers.get(tensor_name.path)
        device = default if layer is None else layer.device
        if not new and tensor_name in wanted:
            value = given[tensor_name]
            if value.is_floating_point():
                value = value.to(torch.promote_types(value.dtype, torch.float32))
        elif device.type == "meta":
            kind = torch.float32 if spec.cast or spec.stored else torch.int32
            value = torch.empty(spec.shape, dtype=kind, device="meta")
        else:
            value = spec.init(spec.shape, _generator(seed, tensor_name.key))
            if not spec.stored:
                _same_draw(adapter, tensor_name.key, value)
        moved = value.to(device)
        made[tensor_name] = moved.clone() if spec.stored else moved  # a draw may be shared
    adapter.origin = replace(adapter.origin, rebuilt=frozenset())
    return made


def _expected(
    adapter: Adapter, specs: Mapping[tuple[int, str], Mapping[str, Spec]]
) -> dict[TensorName, Spec]:
    expected: dict[TensorName, Spec] = {}
    for (_, path), of_site in specs.items():
        for spec in of_site.values():
            tensor_name = TensorName(path, spec.name)
            if tensor_name in expected:
                raise TargetError(
                    f"two methods of {adapter.name!r} want the slot {tensor_name.key!r}; give them different "
                    "targets, or attach them as two adapters, which act together."
                )
            expected[tensor_name] = spec
    return expected


def _same_draw(adapter: Adapter, key: str, value: Tensor) -> None:
    """Note the checksum of a tensor that was drawn again; it must be that of the first draw."""
    found = checksum(value.contiguous())
    if adapter.drawn.setdefault(key, found) != found:
        raise AttachError(
            f"adapter {adapter.name!r}: {key!r} is made again, from a seed or from the base, and this version of torch "
            "makes other numbers than the one that made the adapter. Use that version of torch to export it."
        )


def _same_tensors(
    adapter: Adapter, expected: Mapping[TensorName, Spec], given: Mapping[TensorName, Tensor]
) -> None:
    missing = sorted(name.key for name in expected if name not in given)
    extra = sorted(name.key for name in given if name not in expected)
    if missing or extra:
        parts = [f"it lacks {len(missing)}, e.g. {missing[0]!r}"] if missing else []
        parts += (
            [f"it has {len(extra)} that its method does not use here, e.g. {extra[0]!r}"]
            if extra
            else []
        )
        raise AttachError(
            f"adapter {adapter.name!r} has other tensors than this model needs: {'; '.join(parts)}."
        )
    for name, spec in expected.items():
        if tuple(given[name].shape) != spec.shape:
            raise AttachError(
                f"adapter {adapter.name!r}: {name.key!r} has shape {tuple(given[name].shape)}, "
                f"this model needs {spec.shape}."
            )


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
