"""The state of one adapter's training as a folder, so that it resumes exactly.

    adapter/            the adapter folder itself
    state.safetensors   optimiser moments and counts, gradients so far, what the method remembers, its RNG
    state.json          schema, counts, token weight of the gradients, and what the caller adds

Nothing is pickled. Writing is atomic (`trimtab.adapt.files.replacing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.disk import read_json, read_tensors, replacing, write_json
from trimtab.engine.tenant import Tenant
from trimtab.errors import BaseMismatchError, FileFormatError

SCHEMA = 2
ADAPTER, TENSORS, STATE = "adapter", "state.safetensors", "state.json"
_GRADIENT, _MEMORY = "grad::", "memory::"
_RNG = "rng"
_OTHERS = _GRADIENT, _MEMORY, _RNG


@dataclass(frozen=True)
class Saved:
    """A state that was read: the adapter; tensors of the optimiser, gradients and the method's memory; counts."""

    adapter: Adapter
    optimiser: dict[str, Tensor]
    gradients: dict[str, Tensor]
    memory: dict[str, Tensor]
    rng: Tensor
    steps: int
    weight: float
    origins: list[str]
    extra: dict[str, Any]


def write(tenant: Tenant, folder: Path, extra: Mapping[str, Any]) -> None:
    """Write the state of ``tenant``. Raises `StorageError`; what was in ``folder`` is then intact."""
    put(tenant.adapter, tensors_of(tenant), {**facts_of(tenant), "extra": dict(extra)}, folder)


def tensors_of(tenant: Tenant) -> dict[str, Tensor]:
    """All tensors of a state but the adapter's, on CPU, as they are named in a file."""
    tensors = dict(tenant.adam.state())
    for key, parameter in tenant.adam.named.items():
        if parameter.grad is not None:
            tensors[f"{_GRADIENT}{key}"] = parameter.grad.detach().cpu().contiguous()
    tensors[_RNG] = tenant.generator.get_state()
    memory = tenant.stepper.memory
    tensors |= {f"{_MEMORY}{k}": value.detach().cpu().contiguous() for k, value in memory.items()}
    return tensors


NEW: Mapping[str, Any] = MappingProxyType({"steps": 0, "weight": 0.0, "origins": []})
"""The facts of an adapter that nobody has trained yet."""


def facts_of(tenant: Tenant) -> dict[str, Any]:
    """What else a state holds of a tenant."""
    return {"steps": tenant.steps, "weight": tenant.weight, "origins": list(tenant.origins)}


def put(
    adapter: Adapter, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], folder: Path
) -> None:
    """Write a folder that `parts` reads. Raises `StorageError`; what was in ``folder`` is then intact."""
    with replacing(folder) as temporary:
        adapter.save(temporary / ADAPTER)
        save_file(dict(tensors), temporary / TENSORS)
        write_json(temporary / STATE, {"schema": SCHEMA, **facts})


def read(folder: Path) -> Saved:
    """Read a state. Raises `FileFormatError` for a folder that is not a whole one."""
    adapter, tensors, facts = parts(folder)
    return assembled(adapter, tensors, facts, str(folder / STATE))


def parts(folder: Path) -> tuple[Adapter, dict[str, Tensor], dict[str, Any]]:
    """The adapter, the other tensors and the facts of a state. Raises as `read`."""
    for needed in (STATE, TENSORS):
        if not (folder / needed).is_file():
            raise FileFormatError(
                f"{folder} has no {needed}: it is not a training state, or an incomplete one."
            )
    counts = read_json(folder / STATE)
    if counts.get("schema") != SCHEMA:
        raise FileFormatError(
            f"{folder / STATE}: schema {counts.get('schema')!r}; this version reads {SCHEMA}."
        )
    tensors = read_tensors(folder / TENSORS)
    return Adapter.load(folder / ADAPTER), tensors, counts


def assembled(
    adapter: Adapter, tensors: Mapping[str, Tensor], counts: Mapping[str, Any], where: str
) -> Saved:
    """A state of its parts. Raises `FileFormatError` where facts are missing; ``where`` they should be."""
    try:
        return Saved(
            adapter=adapter,
            optimiser={k: v for k, v in tensors.items() if not k.startswith(_OTHERS)},
            gradients=_below(tensors, _GRADIENT),
            memory=_below(tensors, _MEMORY),
            rng=tensors[_RNG],
            steps=int(counts["steps"]),
            weight=float(counts["weight"]),
            origins=list(counts["origins"]),
            extra=dict(counts["extra"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{where} is incomplete: {error!r}.") from error


def restore(tenant: Tenant, saved: Saved) -> None:
    """Put a state into a tenant whose adapter has the same tensors."""
    made_for, here = saved.adapter.base, tenant.adapter.base
    if made_for is not None and here is not None and (reason := made_for.mismatch(here)):
        raise BaseMismatchError(f"the state was saved on another base: {reason}.")
    values = saved.adapter.tensors
    if values.keys() != tenant.adapter.tensors.keys():
        raise FileFormatError(
            f"the state was saved for another adapter than {tenant.adapter.name!r}: other tensors."
        )
    with torch.no_grad():
        for key, tensor in tenant.adapter.tensors.items():
            tensor.copy_(values[key])
    take_up(tenant, saved)


def take_up(tenant: Tenant, saved: Saved) -> None:
    """Let a tenant, whose tensors are those of a state, go on from it."""
    tenant.adam.clear()
    tenant.adam.restore(saved.optimiser)
    for key, value in saved.gradients.items():
        parameter = tenant.adam.named[key]
        parameter.grad = value.to(parameter.device).clone()
    devices = {parameter.device for parameter in tenant.adam.named.values()}
    tenant.stepper.memory = {k: v.to(next(iter(devices))) for k, v in saved.memory.items()}
    tenant.stepper.step = saved.steps
    tenant.weight, tenant.origins = saved.weight, list(saved.origins)
    tenant.generator.set_state(saved.rng.clone())  # torch reads it as aligned


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
