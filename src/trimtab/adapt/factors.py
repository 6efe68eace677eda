"""Low-rank factors as tensors: their slots, first values, and the plain form of those that keep their first ones.

B A − B₀ A₀ = [B, −B₀] [A; A₀]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.adapt.contract import Spec, kaiming_uniform, normal, zeros
from trimtab.adapt.initial import Initialisation, Start
from trimtab.frozen import Layer

FACTORS = ("lora_A.weight", "lora_B.weight", "lora_A_first.weight", "lora_B_first.weight")
EMBEDDED = (
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_embedding_A_first",
    "lora_embedding_B_first",
)
"""Slots of A, B, A₀ and B₀."""
OFFSET = "lora_B.bias"
"""Slot of the bias of B."""
KEPT = {
    slot: short
    for slots in (FACTORS, EMBEDDED)
    for slot, short in zip(slots[2:], ("A0", "B0"), strict=True)
}
"""Slots of first factors that are kept -> short names."""
CHANGE = "lora_base_change"
"""Slot of what the base's weight is changed by, where an initialisation is meant beside another one."""


def factor_specs(
    layer: Layer, rank: int, scaling: float, init: Initialisation | None
) -> dict[str, Spec]:
    """A and B, and A₀ and B₀ where ``init`` begins away from zero; None is LoRA's own start."""
    shape_a, shape_b = layer.factor_shapes(rank)
    a, b, a_first, b_first = EMBEDDED if layer.kind == "embedding" else FACTORS
    if init is None and layer.kind == "embedding":
        return {"A": Spec(a, shape_a, zeros), "B": Spec(b, shape_b, normal(1.0))}
    if init is None:
        return {"A": Spec(a, shape_a, kaiming_uniform), "B": Spec(b, shape_b, zeros)}
    start = Start(init, layer, rank, scaling)
    specs = {"A": Spec(a, shape_a, start.a), "B": Spec(b, shape_b, start.b)}
    if init.beside:
        return {**specs, "D": Spec(CHANGE, layer.shape, start.change, stored=False)}
    if not init.away:
        return specs
    kept = {"A0": Spec(a_first, shape_a, start.a), "B0": Spec(b_first, shape_b, start.b)}
    return {**specs, **kept}


def plain_factors(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of one site, by slot, with its four factors made two; any others stay."""
    rest = {slot: t for slot, t in tensors.items() if slot not in (*FACTORS, *EMBEDDED)}
    for slots in (FACTORS, EMBEDDED):
        if slots[2] in tensors:
            a, b, a_first, b_first = (tensors[slot] for slot in slots)
            pair = joined([(a, b, rank), (a_first, -b_first, rank)])
            return {**rest, **dict(zip(slots[:2], pair, strict=True))}
    return dict(tensors)


def stacked(a: Tensor, b: Tensor, rank: int) -> bool:
    """Whether these are the factors of all experts of a mixture, (E, R, I) and (E, O, R)."""
    return a.dim() == 3 and a.shape[1] == rank == b.shape[-1] and len(a) == len(b)


def paired(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors as (G, R/G, I) and (G, O/G, R/G): a pair for each expert, or group of a convolution; mostly one."""
    if stacked(a, b, rank):
        return a, b
    groups = rank // b.shape[1]
    return a.flatten(1).unflatten(0, (groups, -1)), b.flatten(1).unflatten(0, (groups, -1))


def joined(parts: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Factors (A, B, rank) beside one another: their product is the sum of the products."""
    a, b, rank = parts[0]
    if stacked(a, b, rank):
        return torch.cat([a for a, _, _ in parts], dim=1), torch.cat(
            [b for _, b, _ in parts], dim=2
        )
    groups = rank // b.shape[1]
    rows = torch.cat([a.unflatten(0, (groups, -1)) for a, _, _ in parts], dim=1)
    return rows.flatten(0, 1), torch.cat([b for _, b, _ in parts], dim=1)
