"""What enters inside attention: keys and values before its own, and gated attentions beside it.

A method that gives `Method.keys_values` or `Method.beside` is placed at attention modules with the role
``ROLE``. A pre-hook on each such module gathers what the owners of this forward put in, and hands it to the
attention function (see `trimtab.adapt.attend`). Prompts that were read before the text enter the same way
(see `trimtab.adapt.front`).
"""

from __future__ import annotations

import dis
import inspect
import sys
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapt import slots
from trimtab.adapt.at import At
from trimtab.adapt.attend import OURS
from trimtab.adapt.context import Context
from trimtab.adapt.edit import Edit
from trimtab.adapt.injected import KEYWORD, Before, Beside, Injected
from trimtab.adapt.route import Owner, Part
from trimtab.adapt.tree import walk
from trimtab.errors import UnsupportedError
from trimtab.models.attention_layer import AttentionLayer

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.adapt.bank import Bank
    from trimtab.models.anatomy import Anatomy

ROLE = "attention"
_CHOICE = "_attn_implementation_internal"
"""Of a config alone, not of the configs inside it."""


# -- attaching ----------------------------------------------------------------------------------------


def check(model: nn.Module, adapter: Adapter, anatomy: Anatomy) -> None:
    """Refuse, before anything changes, a model whose attention cannot be reached."""
    paths = [site.path for site in adapter.sites if site.role == ROLE]
    if paths:
        check_reach(model, paths, anatomy, adapter.method.kind)


def check_reach(model: nn.Module, paths: list[str], anatomy: Anatomy, kind: str) -> None:
    """Raise `UnsupportedError` where nothing can be put inside these attentions."""
    implementation = getattr(anatomy.config, "_attn_implementation", None)
    if not isinstance(model, PreTrainedModel) or implementation not in {*OURS, *OURS.values()}:
        raise UnsupportedError(
            f"{kind} puts keys and values inside attention, which needs a transformers model with "
            f"'sdpa' or 'eager' attention; this one has {implementation!r}. Load it with attn_implementation='sdpa'."
        )
    if not reachable(model, paths, anatomy):
        raise UnsupportedError(
            f"{type(model).__name__} does not use the attention registry of transformers, or hands nothing on to it, "
            "so nothing can be put inside its attention."
        )


def reachable(model: PreTrainedModel, paths: list[str], anatomy: Anatomy) -> bool:
    """Whether these attentions look their function up in the registry of transformers."""
    kinds = {type(anatomy.modules[anatomy.experts.get(path, path)]) for path in paths}
    return model._can_set_attn_implementation() and all(map(_asks_registry, kinds))


def _asks_registry(kind: type[nn.Module]) -> bool:
    """Whether a class is an attention that looks its function up (T5's does only in later releases of transformers).

    Norms and MLPs live in the same modules, but hand no further keywords on; SigLIP's attention takes them and drops
    them, so that nothing would arrive.
    """
    forward = inspect.unwrap(kind.forward)
    further = [
        p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.VAR_KEYWORD
    ]
    hands_on = any(
        step.opname.startswith("LOAD_FAST") and further[0] in str(step.argval)
        for step in (dis.get_instructions(forward) if further else ())
    )
    return hands_on and "ALL_ATTENTION_FUNCTIONS" in sys.modules[kind.__module__].__dict__


def set_implementation(model: nn.Module, name: str) -> None:
    """Of the model and of every model inside it (earlier releases leave out T5's stacks)."""
    for part in walk(model):
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != name:
            part.set_attn_implementation(name)


class Ours:
    """Inside, attention is ours where it would be the one of torch: the faster one of the two is taken."""

    def __init__(self, model: nn.Module) -> None:
        parts = [part for part in walk(model) if isinstance(part, PreTrainedModel)]
        configs = {id(p.config): p.config for p in parts if p._can_set_attn_implementation()}
        self._configs: list[Any] = list(configs.values())
        self._taken: list[Any] = []

    def __enter__(self) -> None:
        self._taken = [
            config for config in self._configs if getattr(config, _CHOICE, None) == "sdpa"
        ]
        self._set(OURS["sdpa"])

    def __exit__(self, *raised: object) -> None:
        self._set("sdpa")

    def _set(self, name: str) -> None:
        for config in self._taken:
            setattr(config, _CHOICE, name)


def insert(model: nn.Module, bank: Bank, edit: Edit, anatomy: Anatomy) -> None:
    """Place one edit at one attention module."""
    injection(model, bank, edit.path, anatomy).edits.setdefault(edit.adapter, []).append(edit)


def injection(model: nn.Module, bank: Bank, path: str, anatomy: Anatomy) -> Injection:
    """The hook of one attention module, made if there is none yet."""
    if bank.attention_before is None:
        bank.attention_before = str(cast(PreTrainedModel, model).config._attn_implementation)
        set_implementation(model, OURS.get(bank.attention_before, bank.attention_before))
    if path not in bank.injections:
        module = anatomy.modules[path]
        source = _bias_source(anatomy, path)
        made = Injection(bank, path, AttentionLayer.at(anatomy, path), source)
        made.handle = module.register_forward_pre_hook(made, with_kwargs=True)
        bank.injections[path] = made
    return bank.injections[path]


def holder(bank: Bank, path: str) -> nn.Module:
    """The module that holds the adapter tensors of one attention (which is not wrapped)."""
    return slots.nested(bank, _node(path))


def _node(path: str) -> str:
    return f"attention.{path}"


def remove(model: nn.Module, bank: Bank, name: str) -> None:
    """Take an adapter's edits out; drop what holds nothing any more."""
    for path, found in list(bank.injections.items()):
        if found.edits.pop(name, None):
            slots.tidy(bank, _node(path))
        if not found.edits:
            found.handle.remove()
            del bank.injections[path]
    if not bank.injections and bank.attention_before is not None:
        set_implementation(model, bank.attention_before)
        bank.attention_before = None


def _bias_source(anatomy: Anatomy, path: str) -> nn.Module | None:
    """Where attention adds a learned bias by distance (T5), the module of the same stack that learns it."""
    if path in anatomy.role("cross_attention"):
        return None
    stack = path.partition(".block.")[0]
    for other, module in anatomy.modules.items():
        if other.startswith(f"{stack}.") and module.__dict__.get("has_relative_attention_bias"):
            return module
    return None


# -- at each forward ----------------------------------------------------------------------------------


class Injection:
    """Pre-hook of one attention module."""

    def __init__(
        self, bank: Bank, path: str, layer: AttentionLayer, bias_source: nn.Module | None
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
        before: list[Before] = []
        beside: list[Beside] = []
        filled = context.pages is not None and not context.pages.filling
        for owner in dict.fromkeys(context.route.owners):
            for edit in bank.acting(self.edits, owner, context.training):
                call = self._call(edit, context, owner, x)
                holder = bank.get_submodule(_node(self.path)) if edit.tensors else bank
                call.holder = holder
                params = edit.params(holder, x.dtype)
                pair = None if filled else edit.method.keys_values(params, call)
                if pair is not None:
                    before.append(Before(owner, *pair))
                gated = edit.method.beside(params, call)
                if gated is not None:
                    keys, values, gate = gated
                    beside.append(
                        Beside(owner, keys, values, gate * bank.scales.get(edit.adapter, 1.0))
                    )
            if self.path in context.prompts.get(owner, ()):
                before.append(Before(owner, *context.prompts[owner][self.path], read=True))
        if not before and not beside and context.caught is None:
            return None
        injected = Injected(self.path, context, before, beside, self.bias_source)
        return args, {**kwargs, KEYWORD: injected}

    def _call(self, edit: Edit, context: Context, owner: Owner, x: Tensor) -> At:
        route = context.route
        units = x.shape[0] if route.every else len(route.owners)
        part = Part(owner, None, None, False, units)
        home = self.bank.home(edit.adapter)
        call = At(edit, self.layer, context, part, home, x.dtype, context.training)
        call.x = x
        return call
