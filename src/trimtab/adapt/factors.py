"""Low-rank factors as tensors: their slots, first values, and the plain form of those that keep their first ones.

B A − B₀ A₀ = [B, −B₀] [A; A₀]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.adapt.contract import Params, Spec, kaiming_uniform, normal, zeros
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
KEPT = {
    slot: short
    for slots in (FACTORS, EMBEDDED)
    for slot, short in zip(slots[2:], ("A0", "B0"), strict=True)
}
"""Slots of first factors that are kept -> short names."""


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
    if not init.away:
        return specs
    kept = {"A0": Spec(a_first, shape_a, start.a), "B0": Spec(b_first, shape_b, start.b)}
    return {**specs, **kept}


def whole(p: Params) -> tuple[Tensor, Tensor]:
    """One pair of factors of the whole change, without its scale."""
    if "A0" not in p:
        return p["A"], p["B"]
    return beside([(p["A"], p["B"]), (p["A0"], -p["B0"])])


def plain_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one site, by slot, with its four factors made two; any others stay."""
    rest = {slot: t for slot, t in tensors.items() if slot not in (*FACTORS, *EMBEDDED)}
    for slots in (FACTORS, EMBEDDED):
        if slots[2] in tensors:
            p = dict(zip(("A", "B", "A0", "B0"), (tensors[s] for s in slots), strict=True))
            return {**rest, **dict(zip(slots[:2], whole(p), strict=True))}
    return dict(tensors)


def beside(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Factors whose product is the sum of these: ranks are concatenated (group by group, expert by expert)."""
    a, b = factors[0]
    stacked = (
        a.dim() == 3 and b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    )
    if stacked and not a.shape[0] == b.shape[0] == a.shape[1] == 1:  # experts
        return torch.cat([a for a, _ in factors], dim=1), torch.cat([b for _, b in factors], dim=2)
    groups = a.shape[0] // b.shape[1]
    parts = [a.unflatten(0, (groups, -1)) for a, _ in factors]
    return torch.cat(parts, dim=1).flatten(0, 1), torch.cat([b for _, b in factors], dim=1)
