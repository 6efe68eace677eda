"""An adapter whose tokens choose among several trained LoRAs (`trimtab.methods.arrow`).

With general LoRAs beside them, what all share is taken out of each first (GenKnowSub, ACL 2025):

    A_e ← A_e − mean A_g,   B_e ← B_e − mean B_g,   g over the general ones

The adapters that it is made of stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter, Origin, SiteSpec, TensorName
from trimtab.adapt.lowrank import LowRank
from trimtab.adapt.parse import methods
from trimtab.errors import ConfigError, UnsupportedError

A, B = "lora_A.weight", "lora_B.weight"


@torch.no_grad()
def routed(
    adapters: Sequence[Adapter],
    *,
    general: Sequence[Adapter] = (),
    top_k: int = 3,
    temperature: float = 1.0,
    seed: int = 0,
    name: str = "router",
) -> Adapter:
    """An adapter of `trimtab.methods.arrow.Arrow` made of LoRAs.

    Args:
        adapters: the experts: LoRAs of one rank, on the same linear layers.
        general: LoRAs of general knowledge, whose mean is taken out of each expert.
        top_k, temperature, seed: as `Arrow`'s.

    Raises:
        ConfigError: none, or they differ in rank or in where they act.
        UnsupportedError: one is no plain LoRA on linear layers.
    """
    if not adapters:
        raise ConfigError("a router needs LoRAs to choose among, and none were given.")
    first, paths = adapters[0], _paths(adapters[0])
    for other in (*adapters, *general):
        if _paths(other) != paths:
            raise ConfigError(
                f"{first.name!r} and {other.name!r} act on different layers; experts must all act on the same."
            )
    tensors: dict[TensorName, Tensor] = {}
    ranks: set[int] = set()
    for path in paths:
        each = [_factors(adapter, path) for adapter in adapters]
        shared = [_factors(adapter, path) for adapter in general]
        ranks |= {a.shape[0] for a, _, _ in [*each, *shared]}
        if len(ranks) > 1:
            raise ConfigError(f"the experts have the ranks {sorted(ranks)}; they must have one.")
        mean_a = torch.stack([a for a, _, _ in shared]).mean(0) if shared else 0.0
        mean_b = torch.stack([b for _, b, _ in shared]).mean(0) if shared else 0.0
        all_a = torch.stack([a - mean_a for a, _, _ in each])
        all_b = torch.stack([(b - mean_b) * scale for _, b, scale in each])
        tensors[TensorName(path, "arrow_A")] = all_a
        tensors[TensorName(path, "arrow_B")] = all_b
    method = methods.get("arrow").parse(
        {
            "targets": tuple(paths), "experts": len(adapters), "rank": ranks.pop(),
            "top_k": min(top_k, len(adapters)), "temperature": temperature, "seed": seed,
        }
    )  # fmt: skip
    origin = Origin(
        base_name=first.origin.base_name,
        task_type=first.origin.task_type,
        in_peft=False,
        provenance={"routes_among": [adapter.name for adapter in adapters]},
    )
    sites = [SiteSpec(path, "", 0) for path in paths]
    return Adapter(name, method, sites, tensors, base=first.base, origin=origin)


def _paths(adapter: Adapter) -> list[str]:
    """Where a plain LoRA acts."""
    method = adapter.method
    plain = (
        isinstance(method, LowRank)
        and method.kind == "lora"
        and method.plain() == method
        and not (method.rebased or method.lora_bias or dict(method)["invocation"])
    )
    if not plain or any(site.role or site.method for site in adapter.sites):
        raise UnsupportedError(
            f"{adapter.name!r} ({method.kind}) is no plain LoRA, so no token can choose it by its factors; take "
            "trimtab.exported(adapter) where that is one."
        )
    return sorted({site.path for site in adapter.sites})


def _factors(adapter: Adapter, path: str) -> tuple[Tensor, Tensor, float]:
    """A, B and the scale of a LoRA at one layer."""
    held, method = adapter.at_site(path), adapter.method.at(path)
    if A not in held or held[A].dim() != 2 or not isinstance(method, LowRank):
        raise UnsupportedError(
            f"{adapter.name!r}: {path!r} is no linear layer; tokens choose by what enters one."
        )
    return held[A].detach(), held[B].detach(), method.scaling
