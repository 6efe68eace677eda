"""Keys and values that enter inside attention, through the attention registry of transformers.

A method that gives `Method.keys_values` is placed at self-attention modules with the role ``ROLE``. A
pre-hook on each such module hands the prefixes of this forward to the attention function as a keyword;
a registered function puts them before the keys and values and widens the mask. So caches, checkpoints,
grouped queries, padding and generation are the model's own, and a row without a prefix is the base's.

The prefixes of all owners in a batch lie side by side, and each position sees its own owner's only:
one rule for rows, for packed documents and for stacks.

Shapes: B rows, T queries, S keys, P prefix tokens of all owners together, G key heads, D head width.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from trimtab.adapt.at import At
from trimtab.adapt.context import Context
from trimtab.adapt.edit import Edit
from trimtab.adapt.route import Owner, Part, Route
from trimtab.errors import RouteError, UnsupportedError
from trimtab.frozen.sublayer import SubLayer

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.adapt.bank import Bank
    from trimtab.models.anatomy import Anatomy

ROLE = "attention"
KEYWORD = "trimtab_prefixes"
_NAMES = {"sdpa": "trimtab_sdpa", "eager": "trimtab_eager"}


# -- attaching ----------------------------------------------------------------------------------------


def check(model: nn.Module, adapter: Adapter, anatomy: Anatomy) -> None:
    """Refuse, before anything changes, a model whose attention cannot be reached."""
    if all(site.role != ROLE for site in adapter.sites):
        return
    implementation = getattr(anatomy.config, "_attn_implementation", None)
    if not isinstance(model, PreTrainedModel) or implementation not in {*_NAMES, *_NAMES.values()}:
        raise UnsupportedError(
            f"{adapter.method.kind} puts keys and values inside attention, which needs a transformers model with "
            f"'sdpa' or 'eager' attention; this one has {implementation!r}. Load it with attn_implementation='sdpa'."
        )
    paths = [site.path for site in adapter.sites if site.role == ROLE]
    reached = {type(anatomy.modules[anatomy.experts.get(path, path)]) for path in paths}
    if not model._can_set_attn_implementation() or not all(map(_asks_registry, reached)):
        raise UnsupportedError(
            f"{type(model).__name__} does not use the attention registry of transformers, so nothing can be put "
            "inside its attention."
        )


def _set_implementation(model: nn.Module, name: str) -> None:
    """Of the model and of every model inside it (earlier releases leave out T5's stacks)."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != name:
            part.set_attn_implementation(name)


def _asks_registry(kind: type[nn.Module]) -> bool:
    """Whether a class is an attention that looks its function up (T5's does only in later releases of transformers).

    Norms and MLPs live in the same modules, but hand no further keywords on.
    """
    keywords = inspect.signature(kind.forward).parameters.values()
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in keywords)
    return hands_on and "ALL_ATTENTION_FUNCTIONS" in sys.modules[kind.__module__].__dict__


def insert(model: nn.Module, bank: Bank, edit: Edit, anatomy: Anatomy) -> None:
    """Place one edit at one attention module."""
    injection = bank.injections.get(edit.path)
    if injection is None:
        module = anatomy.modules[edit.path]
        source = _bias_source(anatomy, edit.path)
        layer = SubLayer(module, anatomy.width)
        injection = Injection(
            bank, edit.path, layer, None if source is None else anatomy.modules[source]
        )
        injection.handle = module.register_forward_pre_hook(injection, with_kwargs=True)
        bank.injections[edit.path] = injection
    injection.edits.setdefault(edit.adapter, []).append(edit)
    if bank.attention_before is None:
        bank.attention_before = str(cast(PreTrainedModel, model).config._attn_implementation)
        _set_implementation(model, _NAMES.get(bank.attention_before, bank.attention_before))
        if anatomy.family.shifts_positions:
            backbone = _backbone(model)
            bank.shift = backbone.register_forward_pre_hook(Shift(bank, backbone), with_kwargs=True)


def remove(model: nn.Module, bank: Bank, name: str) -> None:
    """Take an adapter's edits out; drop what holds nothing any more."""
    for path, injection in list(bank.injections.items()):
        injection.edits.pop(name, None)
        if not injection.edits:
            injection.handle.remove()
            del bank.injections[path]
    if not bank.injections:
        _restore(model, bank)


def _restore(model: nn.Module, bank: Bank) -> None:
    """Give the model its own attention function back."""
    if bank.attention_before is not None:
        _set_implementation(model, bank.attention_before)
        bank.attention_before = None
    if bank.shift is not None:
        bank.shift.remove()
        bank.shift = None


def _backbone(model: nn.Module) -> nn.Module:
    """The module that turns positions into embeddings: the one below the head."""
    inner = model._modules.get(str(getattr(type(model), "base_model_prefix", "")))
    return inner if inner is not None else model


def _bias_source(anatomy: Anatomy, path: str) -> str | None:
    """Where attention adds a learned bias by distance (T5), the module of the same stack that learns it."""
    stack = path.partition(".block.")[0]
    for other, module in anatomy.modules.items():
        if other.startswith(f"{stack}.") and module.__dict__.get("has_relative_attention_bias"):
            return other
    return None


# -- at each forward ----------------------------------------------------------------------------------


class Prefixes:
    """Keys and values of all owners, side by side, and the columns of each owner."""

    def __init__(self, keys_PC: Tensor, values_PC: Tensor, columns: dict[Owner, tuple[int, int]], context: Context,
                 bias: nn.Module | None) -> None:  # fmt: skip
        self.keys = keys_PC
        self.values = values_PC
        self.columns = columns
        self.context = context
        self.bias = bias

    def visible(self, rows: int, length: int, device: torch.device) -> Tensor:
        """(B, 1, T, P), true where a position may see a prefix token: its own owner's."""
        width = self.keys.shape[0]
        route = self.context.route
        owner = route.single
        if owner is not None:
            start, stop = self.columns.get(owner, (0, 0))
            row = torch.zeros(width, dtype=torch.bool, device=device)
            row[start:stop] = True
            return row.expand(rows, 1, length, width)
        owners = list(dict.fromkeys(route.owners))
        table = torch.zeros(len(owners) + 1, width, dtype=torch.bool)
        for number, who in enumerate(owners):
            start, stop = self.columns.get(who, (0, 0))
            table[number, start:stop] = True
        return table.to(device)[position_owners(route, owners, rows, length).to(device)][:, None]


class Injection:
    """Pre-hook of one attention module."""

    def __init__(
        self, bank: Bank, path: str, layer: SubLayer, bias_source: nn.Module | None
    ) -> None:
        self.bank = bank
        self.path = path
        self.layer = layer
        self.bias_source = bias_source
        self.edits: dict[str, list[Edit]] = {}
        self.handle: Any = None

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        bank = self.bank
        bank.fire(self.path)
        context = bank.context(module.training)
        x = args[0] if args else kwargs["hidden_states"]
        keys, values, columns, width = [], [], {}, 0
        for owner in dict.fromkeys(context.route.owners):
            pairs = [
                pair
                for edit in self._acting(owner)
                if (pair := self._pair(edit, context, owner, x)) is not None
            ]
            if not pairs:
                continue
            keys += [pair[0] for pair in pairs]
            values += [pair[1] for pair in pairs]
            columns[owner] = (width, width + sum(pair[0].shape[0] for pair in pairs))
            width = columns[owner][1]
        if not columns:
            return None
        prefixes = Prefixes(torch.cat(keys), torch.cat(values), columns, context, self.bias_source)
        return args, {**kwargs, KEYWORD: prefixes}

    def _acting(self, owner: Owner) -> list[Edit]:
        return [edit for name in owner for edit in self.edits.get(name, ())]

    def _pair(
        self, edit: Edit, context: Context, owner: Owner, x: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        part = Part(owner, None, None, False, len(context.route.owners))
        call = At(edit, self.layer, context, part, self.bank, x.dtype, self.bank.training)
        call.x = x
        return edit.method.keys_values(edit.params(self.bank, x.dtype), call)


class Shift:
    """Pre-hook of the backbone: real tokens come after their owner's prefix."""

    def __init__(self, bank: Bank, backbone: nn.Module) -> None:
        self.bank = bank
        self.takes = "position_ids" in inspect.signature(backbone.forward).parameters

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        context = self.bank.context(module.training)
        route = context.route
        lengths = {owner: self._length(owner) for owner in dict.fromkeys(route.owners)}
        if not any(lengths.values()) or not self.takes:
            return None
        x = args[0] if args and args[0] is not None else kwargs.get("input_ids")
        x = kwargs["inputs_embeds"] if x is None else x
        rows, length = x.shape[:2]
        positions = kwargs.get("position_ids")
        if positions is None:
            past = kwargs.get("past_key_values")
            seen = 0 if past is None else past.get_seq_length()
            positions = (torch.arange(length, device=x.device) + seen)[None]
        owner = route.single
        if owner is not None:
            shift: Tensor | int = lengths[owner]
        else:
            owners = list(lengths)
            table = torch.tensor([*lengths.values(), 0])
            shift = table[position_owners(route, owners, rows, length)].to(x.device)
            _separable(positions + shift, route)
        return args, {**kwargs, "position_ids": positions + shift}

    def _length(self, owner: Owner) -> int:
        return sum(
            method.virtual_tokens for name in owner for method in self.bank.adapters[name].methods
        )


def position_owners(route: Route, owners: list[Owner], rows: int, length: int) -> Tensor:
    """(B, T) index into ``owners`` of each position; -1 where nobody's."""
    if route.spans is None:
        numbers = torch.tensor([owners.index(owner) for owner in route.owners])
        if len(numbers) != rows:
            raise RouteError(
                f"attention was given {rows} rows, the route names {len(numbers)} owners."
            )
        return numbers[:, None].expand(rows, length)
    found = torch.full((rows, length), -1)
    for owner, span in zip(route.owners, route.spans, strict=True):
        found[span.row, span.start : span.stop] = owners.index(owner)
    return found


def _separable(positions: Tensor, route: Route) -> None:
    """transformers tells packed documents apart by jumps of the positions; a shift must leave a jump."""
    for span in route.spans or ():
        if (
            span.start
            and int(positions[span.row, span.start] - positions[span.row, span.start - 1]) == 1
        ):
            raise RouteError(
                "two documents packed side by side have prefixes whose lengths differ by exactly the length of the "
                "first document, which hides the boundary between them; pack them in another order or pad."
            )


# -- the attention functions --------------------------------------------------------------------------


def _attend(inner: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
            mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    prefixes: Prefixes | None = kwargs.pop(KEYWORD, None)
    if prefixes is None:
        return inner(module, query, key, value, mask, *args, **kwargs)
    rows, _, length, _ = query.shape
    mask, key, value = _own_mask(module, mask, query, key, value, kwargs)
    visible = prefixes.visible(rows, length, query.device)
    if mask.dtype != torch.bool:
        least = torch.finfo(mask.dtype).min
        visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, least)
    mask = torch.cat([visible, mask.expand(rows, 1, length, mask.shape[-1])], dim=-1)
    key = torch.cat([_as_heads(prefixes.keys, key), key], dim=2)
    value = torch.cat([_as_heads(prefixes.values, value), value], dim=2)
    bias = kwargs.get("position_bias")
    if bias is not None:
        kwargs["position_bias"] = _widened(bias, prefixes)
    return inner(module, query, key, value, mask, *args, **kwargs)


def _as_heads(prefix_PC: Tensor, like_BGSD: Tensor) -> Tensor:
    rows, heads, _, width = like_BGSD.shape
    split = prefix_PC.to(like_BGSD.dtype).reshape(-1, heads, width).transpose(0, 1)
    return split.expand(rows, -1, -1, -1)


def _own_mask(module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
              kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The mask over the model's own keys; where the model left it out, the one it meant."""
    if mask is not None:
        return mask, key, value
    length, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = bool(module.__dict__.get("is_causal", True)) if causal is None else bool(causal)
    full = torch.ones(length, keys, dtype=torch.bool, device=query.device)
    if not causal or length == 1:
        return full[None, None], key, value
    if keys > length:  # the first fill of a static cache: the rest of it is still empty
        key, value, full = key[:, :, :length], value[:, :, :length], full[:, :length]
    return full.tril()[None, None], key, value


def _widened(bias: Tensor, prefixes: Prefixes) -> Tensor:
    """A bias by distance, with columns for the prefixes: each lies right before position 0 for its owner."""
    length, keys = bias.shape[-2:]
    source = prefixes.bias
    if source is None:
        return torch.cat([bias.new_zeros(*bias.shape[:-1], prefixes.keys.shape[0]), bias], dim=-1)
    compute = cast(Callable[..., Tensor], source.compute_bias)
    columns = []
    for start, stop in prefixes.columns.values():
        width = stop - start
        whole = compute(
            length, keys + width, device=bias.device, past_seen_tokens=keys - length + width
        )
        columns.append(whole[..., :width].to(bias.dtype).expand(*bias.shape[:-1], width))
    return torch.cat([*columns, bias], dim=-1)


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _attend(AttentionInterface()["sdpa"], module, *args, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    own = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return _attend(own, module, *args, **kwargs)


AttentionInterface.register("trimtab_sdpa", _sdpa)
AttentionInterface.register("trimtab_eager", _eager)
AttentionMaskInterface.register("trimtab_sdpa", sdpa_mask)
AttentionMaskInterface.register("trimtab_eager", eager_mask)
