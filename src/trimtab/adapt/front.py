"""Where the text enters a model: what stands before it is read there, and positions move.

`Front` is the pre-hook of a stack (the module that turns token ids into hidden states). For the owners of a
forward it

* lets methods make what they need of their shared tensors, once (`Method.ready`);
* reads their prompts. In a decoder a prompt sees only itself, so one forward of the frozen stack over the
  prompt alone, with its owner's own edits, gives the keys and values that the text finds in each attention:
  the sequence does not grow, and caches, packed documents and padding stay the model's own. In an encoder the
  prompt sees the text too, and the sequence grows (see `trimtab.adapt.grown`);
* moves the text's positions behind what stands before it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapt import attention
from trimtab.adapt.at import readied
from trimtab.adapt.attend import OURS
from trimtab.adapt.context import Context, KeysValues
from trimtab.adapt.documents import told
from trimtab.adapt.edit import Edit
from trimtab.adapt.grown import Growth
from trimtab.adapt.route import Owner, Route, units_at
from trimtab.errors import RouteError, UnsupportedError
from trimtab.frozen import Layer, view

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.adapt.bank import Bank
    from trimtab.models.anatomy import Anatomy

ROLE = "prompt"


class Prompt(NamedTuple):
    """One adapter's prompt, and the embedding layer whose output it stands beside."""

    edit: Edit
    embedding: Layer


# -- attaching ----------------------------------------------------------------------------------------


def check(model: nn.Module, adapter: Adapter, anatomy: Anatomy) -> None:
    """Refuse, before anything changes, a model that no prompt can be put into."""
    if all(site.role != ROLE for site in adapter.sites):
        return
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{adapter.method.kind} puts a prompt before the text, which needs a transformers model that reads tokens; "
            f"{type(model).__name__} is none."
        )
    for stack in _stacks(model, anatomy)[:1]:
        if "inputs_embeds" not in inspect.signature(stack.forward).parameters:
            raise UnsupportedError(
                f"{type(stack).__name__} takes no embeddings in place of token ids, so no prompt can stand before them."
            )


def decoding(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The self-attentions of a decoder, if all of them hide later positions and can be reached."""
    paths = anatomy.role("self_attention")
    if anatomy.encoder_decoder or not isinstance(model, PreTrainedModel) or not paths:
        return []
    causal = all(getattr(anatomy.modules[path], "is_causal", False) for path in paths)
    implementation = getattr(anatomy.config, "_attn_implementation", None)
    known = implementation in {*OURS, *OURS.values()}
    return paths if causal and known and attention.reachable(model, paths, anatomy) else []


def insert(model: nn.Module, bank: Bank, edit: Edit, anatomy: Anatomy) -> None:
    """Place one adapter's prompt."""
    embedding = view(anatomy.modules[edit.path])
    assert embedding is not None
    bank.prompts[edit.adapter] = Prompt(edit, embedding)
    for path in decoding(model, anatomy):
        attention.injection(model, bank, path, anatomy).edits.setdefault(edit.adapter, [])
    prepare(model, bank, edit, anatomy)


def prepare(model: nn.Module, bank: Bank, edit: Edit, anatomy: Anatomy) -> None:
    """Put the hooks in place that an edit before the text or inside attention needs."""
    if edit.readies:
        bank.readying.setdefault(edit.adapter, {})[edit.source] = edit
    if not bank.fronts:
        bank.fronts = [Front(bank, stack, anatomy) for stack in _stacks(model, anatomy)]


def remove(bank: Bank, name: str) -> None:
    """Take an adapter's prompt out, and with the last one the hooks."""
    bank.prompts.pop(name, None)
    bank.readying.pop(name, None)
    if not bank.injections and not bank.prompts:
        for front in bank.fronts:
            front.remove()
        bank.fronts = []


def _stacks(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The modules that turn tokens into hidden states: the one below the head, or encoder and decoder."""
    if anatomy.encoder_decoder and isinstance(model, PreTrainedModel):
        return [model.get_encoder(), model.get_decoder()]
    inner = model._modules.get(str(getattr(type(model), "base_model_prefix", "")))
    return [inner if inner is not None else model]


# -- at each forward ----------------------------------------------------------------------------------


class Length(NamedTuple):
    """Positions before an owner's text: of keys and values, and of its prompt."""

    keys: int
    prompt: int


class Front:
    """The hooks of one stack."""

    def __init__(self, bank: Bank, stack: nn.Module, anatomy: Anatomy) -> None:
        self.bank = bank
        self.stack = stack
        self.names = tuple(inspect.signature(stack.forward).parameters)
        self.shifts = anatomy.family.shifts_positions and "position_ids" in self.names
        self.reads = bool(decoding(anatomy.root, anatomy))
        self.grows = None if self.reads else Growth.of(anatomy.root, stack, anatomy.encoder_decoder)
        self.handles = [stack.register_forward_pre_hook(self.before, with_kwargs=True)]
        if self.grows is not None:
            self.handles.append(stack.register_forward_hook(self.after, prepend=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        context = self.bank.context(module.training)
        owners = dict.fromkeys(context.route.owners)
        if self.bank.readying:
            self._ready(context, owners)
        lengths = {owner: self._length(owner) for owner in owners}
        if not any(map(any, lengths.values())):
            return None
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.reads and (context.pages is None or context.pages.filling):
            for owner, length in lengths.items():
                if length.prompt:
                    context.prompts[owner] = self._read(context, owner, length.keys)
        ahead = {owner: n.keys + self.reads * n.prompt for owner, n in lengths.items()}
        if self.shifts and any(ahead.values()):
            kwargs = self._shifted(context, ahead, kwargs)
        sizes = {owner: length.prompt for owner, length in lengths.items()}
        if self.grows is not None and any(sizes.values()):
            kwargs = self.grows.enter(
                context, sizes, lambda owner: self._embedded(context, owner), kwargs
            )
        return (), kwargs

    def after(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Take the prompts' positions out again, where the rest of the model is not to see them."""
        assert self.grows is not None
        return self.grows.leave(self.bank.context(module.training), out)

    def _length(self, owner: Owner) -> Length:
        methods = [method for name in owner for method in self.bank.adapters[name].methods]
        return Length(
            sum(method.virtual_tokens for method in methods),
            sum(method.prompt_tokens for method in methods),
        )

    def _ready(self, context: Context, owners: dict[Owner, None]) -> None:
        dtype = next(p.dtype for p in self.stack.parameters() if p.is_floating_point())
        for name in {name for owner in owners for name in owner}:
            for source, edit in self.bank.readying.get(name, {}).items():
                if source not in context.ready:
                    home = self.bank.home(name)
                    context.ready[source] = readied(edit, context, home, dtype, context.training)

    def _embedded(self, context: Context, owner: Owner) -> Tensor:
        """(P, width) the prompts of an owner, in the order of its names."""
        found = []
        for name in owner:
            if name in self.bank.prompts:
                edit, embedding = self.bank.prompts[name]
                self.bank.fire(edit.path)
                dtype = embedding.dtype
                home = self.bank.home(name)
                shared = readied(edit, context, home, dtype, context.training)
                embeddings = edit.method.virtual_embeddings(shared)
                assert embeddings is not None
                found.append(embeddings.to(dtype))
        return torch.cat(found)

    def _read(self, context: Context, owner: Owner, start: int) -> KeysValues:
        """The keys and values of an owner's prompt in each attention; kept for a generation."""
        key = ("prompt", owner)
        if key in context.memory and not torch.is_grad_enabled():
            kept: KeysValues = context.memory[key]
            return kept
        embeddings = self._embedded(context, owner)[None]
        length = embeddings.shape[1]
        inner = Context(Route.everyone(owner), rows=1, length=length, training=context.training)
        inner.ready, inner.caught = context.ready, {}
        kwargs: dict[str, Any] = {"inputs_embeds": embeddings, "use_cache": False}
        if self.shifts:
            kwargs["position_ids"] = torch.arange(start, start + length, device=embeddings.device)[
                None
            ]
        outer = self.bank._context
        self.bank._context = inner
        try:
            self.stack.forward(**kwargs)
        finally:
            self.bank._context = outer
        found = {
            path: (_flat(keys), _flat(values)) for path, (keys, values) in inner.caught.items()
        }
        if not torch.is_grad_enabled():
            context.memory[key] = found
        return found

    def _shifted(
        self, context: Context, ahead: dict[Owner, int], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Real tokens come after what stands before them for their owner."""
        route = context.route
        x = kwargs.get("input_ids")
        x = kwargs["inputs_embeds"] if x is None else x
        rows, length = x.shape[:2]
        positions = kwargs.get("position_ids")
        if positions is None:
            past = kwargs.get("past_key_values")
            seen = 0 if past is None else past.get_seq_length()
            positions = (torch.arange(length, device=x.device) + seen)[None]
        context.positions = positions
        owner = route.single
        if owner is not None:
            return {**kwargs, "position_ids": positions + ahead[owner]}
        table = torch.tensor([*(ahead[owner] for owner in route.owners), 0])
        moved = positions + table[units_at(route, rows, length)].to(x.device)
        if not told():
            _separable(moved, route)
        return {**kwargs, "position_ids": moved}


def _flat(tokens_1GPD: Tensor) -> Tensor:
    """-> (P, C)."""
    return tokens_1GPD[0].transpose(0, 1).flatten(1)


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
