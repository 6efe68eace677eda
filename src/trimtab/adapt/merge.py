"""Merging: a theorem about forward.

An edit that is affine in its layer's input equals one weight and bias. They are found by pushing a basis
of the inputs through the edited layer, in fp32 (fp64 where the base is) on a dense copy of that layer, or
by the method's closed form, for which the push is the test. The base is never written: `merge` returns a
new model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trimtab.adapt.at import At
from trimtab.adapt.bank import CHILD, Bank, bank_of
from trimtab.adapt.context import Context
from trimtab.adapt.edit import Bound, Edit, around, enter, leave
from trimtab.adapt.multihead import MultiheadSite
from trimtab.adapt.route import Owner, Part, Route
from trimtab.adapt.site import ExpertsSite, LayerSite, SiteBase
from trimtab.adapt.tree import Children, sites_of, uncover, walk
from trimtab.errors import MergeError, NotMergeableError, RouteError, TargetError
from trimtab.frozen import Layer, view
from trimtab.frozen.experts import ExpertLayer, expert_count, replaced
from trimtab.frozen.lowbit import LowBitLayer
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.frozen.multihead import PARAMETER

Write = Callable[[str, Layer, Tensor, Tensor | None], nn.Module]
"""How a merged layer is stored: ``write(path, layer, weight, bias)`` of what was merged in fp32."""


@torch.no_grad()
def merge(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
    """A new, bare, dense model that computes what ``model`` computes with these adapters.

    `merge_with_report` stores it in another dtype, or in few bits, and measures what that costs.

    Args:
        model: with adapters attached; it is not changed, and shares no tensor with the result.
        names: one adapter, or several in the order in which they nest.

    Raises:
        NotMergeableError: an adapter's edit is not affine; the message says why.
    """
    return densify(fold(copied(model, names), names))


def densify(model: nn.Module) -> nn.Module:
    """Make what is left in few bits in a bare model dense."""
    children = Children(model)
    for path, module in list(model.named_modules()):
        layer = view(module)
        new: nn.Module
        if isinstance(layer, LowBitLayer):
            new = densely(path, layer, layer.dense(), layer.bias())
        elif isinstance(module, LowBitExperts):
            new = module.with_dense({name: module.dense_parameter(name) for name in module.formats})
        else:
            continue
        children.replace(module, new.train(module.training).requires_grad_(False))
    return model


def copied(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
    """A copy of a model to be merged. Raises as `merge`."""
    bank = bank_of(model)
    owner = bank.owner(names)
    check_mergeable(bank, owner)
    if model._modules.get(CHILD) is not bank:
        raise TargetError(
            "merge the model that the adapters were attached to, not a wrapper around it."
        )
    if bank._scope is not None:
        raise RouteError(
            "leave using() or rows() before merging: the adapters to merge are named in the call."
        )
    return copy.deepcopy(model)


def densely(path: str, layer: Layer, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A merged layer in the dtype that the layer computes in. See `Write`."""
    return layer.write(
        weight.to(layer.dtype).contiguous().clone(), kept_bias(layer, bias, layer.dtype)
    )


@torch.no_grad()
def fold(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    finite: bool = False,
    write: Write = densely,
) -> nn.Module:
    """As `merge`, but uses the model up: each layer is replaced as it is merged, so the peak is one layer.

    For a model that nobody else holds (a command that loads, merges and saves). Layers that no adapter edits stay as
    they are, in few bits too. With ``finite``, raises a `MergeError` for a merged weight that is not.
    """
    bank = bank_of(model)
    owner = bank.owner(names)
    check_mergeable(bank, owner)
    unmerge(model)
    children = Children(model)
    own = (p for module in walk(model) for p in module._parameters.values())
    uses = Counter(id(p) for p in own if p is not None)
    ends: dict[int, list[nn.Module]] = {}
    for site in sites_of(model).values():
        if site.acting(owner):
            shared = id(site.base_layer._parameters.get("weight"))
            new = _merged(site, owner, finite, write)
            if uses[shared] > 1:
                ends.setdefault(shared, []).append(new)
            children.replace(site, new)
        else:
            children.replace(site, site.release())
    for shared, layers in ends.items():
        if len(layers) < uses[shared] or not _tied(layers):
            _untie(model)
    from trimtab.adapt.attach import strip

    strip(model, bank)
    return model


@torch.no_grad()
def merge_in_place(model: nn.Module, names: str | Sequence[str], *, finite: bool = False) -> None:
    """Put merged layers in the place of the frozen ones, which are kept aside untouched.

    What the model computes stays the same (but for dropout), for whomever: where the route asks for these adapters,
    in this order, the merged layers compute it without edits; where it asks for anything else, the frozen ones and
    the edits do. `unmerge` ends it. All layers are merged, or none.
    """
    bank = bank_of(model)
    owner = bank.owner(names)
    check_mergeable(bank, owner)
    unmerge(model)
    layers = {
        site: _merged(site, owner, finite)
        for site in sites_of(model).values()
        if site.acting(owner)
    }
    for site, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
        site.cover(layer)
    bank.merged = owner


def unmerge(model: nn.Module) -> None:
    """The frozen layers, bit for bit, in the place of merged ones."""
    uncover(model, bank_of(model))


def _merged(site: SiteBase, owner: Owner, finite: bool, write: Write = densely) -> nn.Module:
    """A new module equal to what a site wraps, with these adapters."""
    if isinstance(site, ExpertsSite):
        new = merged_experts(site, owner)
    elif isinstance(site, MultiheadSite):
        new = merged_multihead(site, owner)
    elif isinstance(site, LayerSite):
        new = merged_layer(site, owner, write)
    else:
        raise AssertionError("there are two kinds of sites")
    if finite and not all(bool(p.isfinite().all()) for p in new.parameters()):
        raise MergeError(
            f"{site.path}: the merged weight is not finite. Look for NaN or infinity in {list(owner)}; nothing was "
            "merged."
        )
    return new


def check_mergeable(bank: Bank, owner: Owner) -> None:
    """Raise for the first adapter whose edit no weight can equal."""
    for name in owner:
        method = bank.require(name).method
        if method.unmergeable:
            raise NotMergeableError(
                f"adapter {name!r} ({method.kind}) cannot be merged: {method.unmergeable}."
            )


def merged_layer(site: LayerSite, owner: Owner, write: Write = densely) -> nn.Module:
    """A new layer equal to the site with these adapters; by default in the base's dtype."""
    weight, bias = merged_weights(site, owner, site.layer, site.acting(owner), site.slots)
    return write(site.path, site.layer, weight, bias).train(site.training)


def merged_weights(
    site: SiteBase,
    owner: Owner,
    layer: Layer,
    edits: Sequence[Edit],
    holder: nn.Module,
    expert: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(W', b')`` in fp32 (fp64 where the base is)."""
    bias = layer.bias()
    dense = view(layer.write(layer.wide(layer.dense()), None if bias is None else layer.wide(bias)))
    if dense is None:
        raise AssertionError("a layer writes a layer")
    context = Context(Route.everyone(owner))
    stack = _stack(site, edits, dense, context, holder, expert, owner)
    if len(stack) == 1 and stack[0].scale == 1.0:
        closed = stack[0].edit.method.merged(stack[0].params, dense, edits[0].role)
        if closed is not None:
            return closed
    return pushed(site, owner, dense, edits, holder, expert)


def pushed(
    site: SiteBase,
    owner: Owner,
    dense: Layer,
    edits: Sequence[Edit],
    holder: nn.Module,
    expert: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(W', b')`` of a dense layer by the universal rule."""
    context = Context(Route.everyone(owner))

    def push(bare: Layer, x: Tensor, y: Tensor | None) -> Tensor:
        stack = _stack(site, edits, bare, context, holder, expert, owner)
        if y is None:
            return around(stack, x, bare.call)
        if enter(stack, x) is not x:
            kind = edits[0].method.kind
            raise NotMergeableError(f"{kind} edits the input of a norm, which is not linear in it.")
        return leave(stack, y)

    return dense.probe(push)


def _stack(site: SiteBase, edits: Sequence[Edit], layer: Layer, context: Context, holder: nn.Module,
           expert: int | None, owner: Owner) -> list[Bound]:  # fmt: skip
    stack = site.bind(
        edits, layer, context, Part(owner, None, None, False, 1), layer.dtype, holder, expert
    )
    for bound in stack:
        home = site.bank.home(bound.edit.adapter)
        bound.call = At(bound.edit, layer, context, bound.call.part, home, layer.dtype, False)
    return stack


def merged_experts(site: ExpertsSite, owner: Owner) -> nn.Module:
    """The experts with new 3-D parameters where these adapters edit them; the others are shared."""
    module = site.base_layer
    edits = site.acting(owner)
    new: dict[str, Tensor] = {}
    for path in dict.fromkeys(edit.path for edit in edits):
        name = path.rpartition(".")[2]
        here = [edit for edit in edits if edit.path == path]
        slices, biases = [], []
        for expert in range(expert_count(module, name)):
            layer = ExpertLayer.of(module, name, expert)
            weight, bias = merged_weights(
                site, owner, layer, here, site.get_submodule(name), expert
            )
            slices.append(weight.T if module.is_transposed else weight)
            biases.append(bias)
        new[name] = torch.stack(slices).to(layer.dtype)
        if (bias := _expert_bias(module, name, biases)) is not None:
            new[f"{name}_bias"] = bias.to(layer.dtype)
    return replaced(module, new)


def merged_multihead(site: MultiheadSite, owner: Owner) -> nn.Module:
    """The attention with a new input projection. Its children are shared: the output projection is merged by itself."""
    layer, module = site.layer, copy.copy(site.frozen)
    weight, bias = merged_weights(site, owner, layer, site.acting(owner), site)
    bias = kept_bias(layer, bias, layer.dtype)
    module._parameters = {
        **module._parameters,
        PARAMETER: nn.Parameter(weight.to(layer.dtype).contiguous().clone()),
        "in_proj_bias": None if bias is None else nn.Parameter(bias),
    }
    return module.train(site.training)


def _expert_bias(module: nn.Module, name: str, biases: Sequence[Tensor | None]) -> Tensor | None:
    found = [bias for bias in biases if bias is not None and bool(bias.any())]
    if module._parameters.get(f"{name}_bias") is not None:
        return torch.stack([bias for bias in biases if bias is not None])
    if found:
        raise NotMergeableError(
            f"the experts' {name} has no bias, and the merged layer would need one."
        )
    return None


def kept_bias(layer: Layer, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """No bias where the base has none and the merged one is zero."""
    if bias is None or (layer.bias() is None and not bool(bias.any())):
        return None
    return bias.to(dtype).clone()


def _tied(layers: Sequence[nn.Module]) -> bool:
    """Whether merged layers have one weight still, which they then share."""
    weights = [layer._parameters.get("weight") for layer in layers]
    first = weights[0]
    if first is None or any(w is None or not torch.equal(w, first) for w in weights):
        return False
    for layer in layers:
        layer._parameters["weight"] = first
    return True


def _untie(model: nn.Module) -> None:
    """A merged layer no longer shares its weight: the model's config must say so, or saving would tie it again."""
    config = model.__dict__.get("config")
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
