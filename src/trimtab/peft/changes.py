"""What adapters change in a model's weights, layer by layer, and LoRAs made of such changes.

    ΔW = W' − W,   W' being the merged weight;   ΔW ≈ B A by singular values:   A_RI = Vᵀ,   B_OR = U S

The base is only read. Shapes: ΔW is (O, I), (O, I, *kernel) for a convolution, (E, O, I) for the experts of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, SiteSpec, TensorName
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import exactly
from trimtab.adapt.edit import Edit
from trimtab.adapt.factors import EMBEDDED, FACTORS, OFFSET
from trimtab.adapt.lowrank import INNER
from trimtab.adapt.merge import check_mergeable, merged_weights
from trimtab.adapt.plan import planned
from trimtab.adapt.site import LayerSite, SiteBase
from trimtab.adapt.tree import anatomy_of, sites_of
from trimtab.errors import UnsupportedError
from trimtab.frozen import Layer
from trimtab.frozen.experts import ExpertLayer
from trimtab.frozen.layer import no_factors
from trimtab.methods.lora import LoRA


@dataclass(frozen=True)
class Change:
    """What some adapters change in one layer: for each that edits it, its number, ΔW, and Δb where it has one."""

    path: str
    layer: Layer
    who: tuple[int, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Factors:
    """A LoRA at one layer, with a scaling of 1, and the change of its bias."""

    path: str
    layer: Layer
    a: Tensor
    b: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A; of one expert, where there are several."""
        return int(self.a.shape[1 if isinstance(self.layer, ExpertLayer) else 0])


def changes(model: nn.Module, names: Sequence[str]) -> Iterator[Change]:
    """The changes by attached adapters, one layer after another. Modules trained in full are left out.

    Raises:
        NotMergeableError: an adapter's edit is not a change of weights.
    """
    bank = bank_of(model)
    for name in names:
        check_mergeable(bank, (name,))
    for site, path in edited(model, names):
        who, weights, biases = [], [], []
        for number, name in enumerate(names):
            edits = edits_at(site, name, path)
            if edits:
                weight, bias = _change(site, name, path, edits)
                who.append(number)
                weights.append(weight)
                biases.append(bias)
        yield Change(path, layer_of(site, path), tuple(who), tuple(weights), tuple(biases))


def edited(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[SiteBase, str]]:
    """The places that any of these adapters edits, in the order of the model."""
    for site in sites_of(model).values():
        paths = [edit.path for name in names for edit in site.edits.get(name, ())]
        for path in dict.fromkeys(paths):
            if any(edits_at(site, name, path) for name in names):
                yield site, path


def edits_at(site: SiteBase, name: str, path: str) -> list[Edit]:
    """An adapter's edits of one layer; none where it trains that layer in full beside its own."""
    if name not in site.edits:
        return []
    beside = {spec.path for spec in trained(site.bank.require(name))}
    return [edit for edit in site.edits[name] if edit.path == path and path not in beside]


def trained(adapter: Adapter) -> list[SiteSpec]:
    """The sites that an adapter trains in full beside its own edits."""
    return [site for site in adapter.sites if site.method >= len(adapter.method.members)]


def layer_of(site: SiteBase, path: str) -> Layer:
    """The frozen layer at a path; of experts, the first."""
    if isinstance(site, LayerSite):
        return site.layer
    return ExpertLayer.of(site.frozen, path.rpartition(".")[2], 0)


def _change(
    site: SiteBase, name: str, path: str, edits: Sequence[Edit]
) -> tuple[Tensor, Tensor | None]:
    if isinstance(site, LayerSite):
        return _delta(site, name, site.layer, edits, site.slots)
    parameter = path.rpartition(".")[2]
    holder = site.get_submodule(parameter)
    count = site.frozen.get_parameter(parameter).shape[0]
    each = [
        _delta(site, name, ExpertLayer.of(site.frozen, parameter, e), edits, holder, e)
        for e in range(count)
    ]
    if any(bias is not None for _, bias in each):
        raise UnsupportedError(f"{path}: the biases of experts have no place in a LoRA.")
    return torch.stack([weight for weight, _ in each]), None


@torch.no_grad()
def _delta(
    site: SiteBase,
    name: str,
    layer: Layer,
    edits: Sequence[Edit],
    holder: nn.Module,
    expert: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    first = edits[0]
    if len(edits) == 1 and isinstance(first.method, LoRA) and not first.role:
        # its product itself: the difference of two weights would have lost digits
        dtype = torch.promote_types(layer.dtype, torch.float32)
        params: Mapping[str, Tensor] = first.params(holder, dtype)
        if expert is not None:
            params = {short: tensor[expert] for short, tensor in params.items()}
        scale = site.bank.scales.get(name, 1.0) * first.scale
        offset = first.method.offset(params)
        product = first.method.product(params, layer) * scale
        return product, None if offset is None or not offset.any() else offset * scale
    weight, bias = merged_weights(site, (name,), layer, edits, holder, expert)
    old = layer.bias()
    if bias is not None and old is not None:
        bias = bias - layer.wide(old)
    return weight - layer.wide(layer.dense()), None if bias is None or not bias.any() else bias


# -- a LoRA of changes --------------------------------------------------------------------------------

Rank = int | Callable[[Tensor], int]
"""How many singular values are kept; or that, from the values of a layer (one row for each group or expert)."""


def whole(values: Tensor) -> int:
    """As many as are not rounding."""
    largest = values.amax()
    seen = (values > largest * values.shape[-1] * torch.finfo(values.dtype).eps * 4).sum(-1)
    return max(1, int(seen.max()))


def decomposed(
    path: str,
    layer: Layer,
    delta: Tensor,
    rank: Rank,
    *,
    clamp: float | None = None,
    driver: str | None = None,
) -> Factors:
    """The nearest factors of a change; ``clamp`` is the quantile of their values beyond which they are cut off."""
    if layer.kind == "norm":
        raise no_factors("norm")
    experts = isinstance(layer, ExpertLayer)
    groups = int(getattr(layer.module, "groups", 1)) if layer.kind == "conv" else 1
    matrix = delta if experts else delta.flatten(1).unflatten(0, (groups, -1))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    kept = max(rank // groups, 1) if isinstance(rank, int) else rank(s)
    kept = min(kept, s.shape[-1])
    b, a = u[..., :kept] * s[..., None, :kept], v[..., :kept, :]
    if clamp is not None:
        bound = _quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    if not experts:
        shape_a, shape_b = layer.factor_shapes(kept * groups)
        a, b = a.reshape(shape_a), b.reshape(shape_b)
    return Factors(path, layer, a.contiguous(), b.contiguous())


def _quantile(values: Tensor, q: float) -> float:
    """As ``torch.quantile``, which takes no more than 2²⁴ values."""
    ordered = values.sort().values
    place = q * (ordered.numel() - 1)
    low = int(place)
    high = min(low + 1, ordered.numel() - 1)
    return float(torch.lerp(ordered[low], ordered[high], place - low))


def lora_of(
    model: nn.Module, name: str, parts: Sequence[Factors], like: Sequence[Adapter]
) -> Adapter:
    """A LoRA of these factors, attached to nothing, with the modules that adapters like it train in full."""
    ranks = {part.path: part.rank for part in parts}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    other = {exactly(path, ranks): rank for path, rank in ranks.items() if rank != usual}
    moved = [part for part in parts if part.bias is not None]
    unbiased = [part for part in moved if part.layer.bias() is None]  # nothing there to be trained
    method = LoRA(
        targets=tuple(ranks),
        rank=usual,
        alpha=float(usual),
        rank_pattern=other,
        alpha_pattern={path: float(rank) for path, rank in other.items()},
        bias="lora_only" if moved and not unbiased else "none",
        lora_bias=bool(unbiased),
    )
    adapter = with_trained(planned(model, method, name, anatomy_of(model)), like)
    for part in parts:
        slots = EMBEDDED if part.layer.kind == "embedding" else FACTORS
        adapter._tensors[TensorName(part.path, slots[0])] = part.a.float()
        adapter._tensors[TensorName(part.path, slots[1])] = part.b.float()
        bias = part.layer.bias()
        if unbiased:
            zero = torch.zeros(part.layer.out_features)
            adapter._tensors[TensorName(part.path, OFFSET)] = (
                zero if part.bias is None else part.bias.float()
            )
        if bias is not None and SiteSpec(part.path, INNER, 0) in adapter.sites:
            new = part.layer.wide(bias.detach())
            new = new.clone() if part.bias is None else new + part.bias
            adapter._tensors[TensorName(part.path, "lora_bias.inner")] = new.float()
    return adapter


def without_trained(adapter: Adapter, name: str | None = None) -> Adapter:
    """A free copy without the modules that it trains in full beside its edits."""
    copy = adapter.detached(name=name)
    left_out = {site.path for site in trained(copy)}
    if not left_out:
        return copy
    method = copy.method
    members = [member.replace(train=()) for member in method.members]
    method = method.remade(members).replace(train=())
    sites = [site for site in copy.sites if site.path not in left_out]
    tensors = {n: t for n, t in copy.named().items() if n.path not in left_out}
    return Adapter(copy.name, method, sites, tensors, base=copy.base, origin=copy.origin)


def with_trained(adapter: Adapter, others: Sequence[Adapter]) -> Adapter:
    """The same with the modules that these train in full, each as it is.

    Raises:
        UnsupportedError: two of them train one module.
    """
    names: list[str] = []
    sites: list[SiteSpec] = []
    tensors = adapter.named()
    number = len(adapter.method.members)
    for other in others:
        own = {site.path: site for site in trained(other)}
        twice = [site.path for site in sites if site.path in own]
        if twice:
            raise UnsupportedError(
                f"{twice[0]!r} is trained in full by two of the adapters: each replaces the frozen one, and two "
                "replacements have no sum. Leave one of them out."
            )
        sites += [SiteSpec(path, site.role, number) for path, site in own.items()]
        tensors |= {n: t.detach().clone() for n, t in other.named().items() if n.path in own}
        for method in (other.method, *other.method.members):
            names += [path for path in method.train if path not in names]
    if not sites:
        return adapter
    method = adapter.method.replace(train=tuple(names))
    every = (*adapter.sites, *sites)
    origin = adapter.origin
    return Adapter(adapter.name, method, every, tensors, base=adapter.base, origin=origin)
