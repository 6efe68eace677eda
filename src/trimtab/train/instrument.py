"""A model whose parts tell a clock when they run: hooks that stay for the length of a ``with``.

    the model and its stack         base      norms, activations, sums and whatever is nothing else
    a site                          adapter   and the layer that it wraps: base, or head
    the output head                 head
    the attention function          attention

The attention function is the one that a model looks up in the registry of transformers. An attention that has it
written into its own code counts as a whole instead, without its layers. Experts whose maps are edited are run one by
one because of the edits, so that all of it but their own products counts as the adapter's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from trimtab.adapt.attend import OURS
from trimtab.adapt.attention import reachable
from trimtab.adapt.bank import bank_of
from trimtab.adapt.site import ExpertsSite, LayerSite, SiteBase
from trimtab.adapt.tree import anatomy_of, sites_of
from trimtab.engine.rooms import Room
from trimtab.frozen.experts import ExpertLayer
from trimtab.models.anatomy import Anatomy
from trimtab.train.clock import Clock


@contextmanager
def instrumented(model: PreTrainedModel, clock: Clock) -> Iterator[None]:
    """Forwards of a model with adapters, inside, tell the clock where they are."""
    with ExitStack() as stack:
        _Hooks(model, clock, stack).place()
        yield


class _Hooks:
    """What is put into a model; ``stack`` takes it out again."""

    def __init__(self, model: PreTrainedModel, clock: Clock, stack: ExitStack) -> None:
        self._model, self._clock, self._stack = model, clock, stack
        self._timed: set[type[ExpertLayer]] = set()

    def place(self) -> None:
        anatomy, bank = anatomy_of(self._model), bank_of(self._model)
        sites, heads = sites_of(self._model), set(anatomy.head)
        for path in bank.injections:  # before the rest, which then comes around them
            self._hooks_of(anatomy.modules[path], "adapter")
        for front in bank.fronts:
            self._hooks_of(front.stack, "adapter")
        backbone = self._model._modules.get(str(self._model.base_model_prefix))
        for module in (self._model, backbone):
            if module is not None:
                self._around(module, "base", last=True)
        for path, site in sites.items():
            self._around(site, "adapter")
            self._frozen(site, "head" if path in heads else "base")
            if isinstance(site, ExpertsSite):
                self._expert_products(site, anatomy)
        for path in heads - set(sites):
            self._around(anatomy.modules[path], "head")
        self._attention(anatomy, set(sites))

    def _frozen(self, site: SiteBase, room: Room) -> None:
        """What the layer that a site wraps does."""
        if not isinstance(site, LayerSite) or site.layer.kind == "sublayer":
            self._around(site.frozen, room)
            return
        site.room = partial(self._clock.inside, room)
        self._stack.callback(setattr, site, "room", nullcontext)

    def _around(self, module: nn.Module, room: Room, *, last: bool = False) -> None:
        """All of a module's call, or what comes before the hooks on its output (``last``: what comes after, too)."""

        def enter(*_: Any) -> None:
            self._clock.enter(room)

        def leave(*_: Any) -> None:
            self._clock.leave()

        before = module.register_forward_pre_hook(enter, prepend=True)
        # also where a recomputation stops a forward midway
        after = module.register_forward_hook(leave, prepend=not last, always_call=True)
        self._stack.callback(before.remove)
        self._stack.callback(after.remove)

    def _hooks_of(self, module: nn.Module, room: Room) -> None:
        """What hooks do to a module's input."""

        def enter(*_: Any) -> None:
            self._clock.enter(room)

        def leave(*_: Any) -> None:
            self._clock.leave()

        self._stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        self._stack.callback(module.register_forward_pre_hook(leave).remove)

    def _attention(self, anatomy: Anatomy, sites: set[str]) -> None:
        known = AttentionInterface()
        parts = [part for part in self._model.modules() if isinstance(part, PreTrainedModel)]
        chosen = {str(part.config._attn_implementation) for part in parts}
        for name in {*chosen, *(OURS[name] for name in chosen if name in OURS)}:
            if name in known:
                function = known[name]
                AttentionInterface.register(name, self._clock.timed("attention", function))
                self._stack.callback(AttentionInterface.register, name, function)
        for path in anatomy.role("self_attention"):
            if chosen <= set(known) and reachable(self._model, [path], anatomy):
                continue
            self._around(anatomy.modules[path], "attention")
            for inner in anatomy.modules:
                if inner.startswith(f"{path}.") and inner not in sites and anatomy.weighted(inner):
                    self._around(anatomy.modules[inner], "base")

    def _expert_products(self, site: ExpertsSite, anatomy: Anatomy) -> None:
        """The products of experts have no module of their own, so their class is what is timed."""
        paths = [path for path, holder in anatomy.experts.items() if holder == site.path]
        names = [path.rpartition(".")[2] for path in paths]
        for kind in {type(ExpertLayer.of(site.frozen, name, 0)) for name in names} - self._timed:
            self._timed.add(kind)
            call = kind.call
            kind.call = self._clock.timed("base", call)  # type: ignore[method-assign]
            self._stack.callback(type.__setattr__, kind, "call", call)
