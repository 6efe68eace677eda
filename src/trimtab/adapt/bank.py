"""The bank: all adapters attached to one model, which of them act, and the context of each forward.

The bank is the child ``trimtab`` of the model's root. It holds adapters' model-level tensors, and hooks
on the model's entries make a `Context` for each call from what the caller passed. One thread runs a
model at a time; a recomputation in backward, on whatever thread, restores the context of its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.adapt import checkpoint, slots
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.context import NO_SEEDS, Context
from trimtab.adapt.documents import PAGES
from trimtab.adapt.known import Known
from trimtab.adapt.lean import lean, leans
from trimtab.adapt.route import Owner, Route
from trimtab.errors import AttachError, RouteError, UnknownNameError, suggest

if TYPE_CHECKING:
    from trimtab.adapt.attention import Injection
    from trimtab.adapt.edit import Edit
    from trimtab.adapt.front import Front, Prompt
    from trimtab.adapt.fusing import Early
    from trimtab.adapt.site import LayerSite
    from trimtab.adapt.stack import Stack

CHILD = "trimtab"
_BATCH_KEYS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "x",
    "input",
)


class Bank(nn.Module):
    """State of one model with adapters. Made by `trimtab.attach`, found by `bank_of`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_keep_own)  # type: ignore[no-untyped-call]
        self.adapters: dict[str, Adapter] = {}
        self.prompted: set[str] = set()
        """Those of them that must know whether a prompt lies in the cache."""
        self.active: list[str] = []
        self.scales: dict[str, float] = {}
        self.disabled: set[str] = set()
        self.off = False
        """Whether nobody acts where no scope says otherwise."""
        self.merged: Owner = ()
        """The adapters whose merged weights stand in the place of the base's; see `trimtab.adapt.merge`."""
        self.dropped: dict[str, int] = {}
        """Adapter -> how many of the first blocks its edits are left out of."""
        self.frozen_before: dict[str, bool] = {}
        self.handles: list[Any] = []
        self.injections: dict[str, Injection] = {}
        self.attention_before: str | None = None
        self.fronts: list[Front] = []
        self.prompts: dict[str, Prompt] = {}
        self.readying: dict[str, dict[tuple[str, ...], Edit]] = {}
        """Adapter -> its edits that make something of their shared tensors once per forward."""
        self.norms: dict[nn.Module, bool] = {}
        """Norms with running statistics -> whether we took them out of training mode."""
        self.homes: dict[str, nn.Module] = {}
        """Adapter -> the module around this model that holds its model-level tensors; see `lodge`."""
        self.stacked: Stack | None = None
        """The adapters that act from slots, if there are any."""
        self.padded: list[nn.TransformerEncoder] = []
        """torch's own encoders that would take padding out, and call none of their layers then."""
        self.blocks: list[nn.Module] = []
        self.known = Known()
        self.fired: set[str] | None = None
        self.plan: Plan | None = None
        self._scope: Route | None = None
        self._context: Context | None = None
        self.early: dict[LayerSite, Early] = {}
        """What layers have computed for siblings that are still to be called in this forward."""
        self._depth = 0
        self._outermost: list[nn.Module] = []  # the module whose forward is open; no child of ours
        self._last: Context | None = None
        self._open_lean: ExitStack | None = None
        self._encoded: tuple[Tensor, dict[Any, Any]] | None = None
        self._memories: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()

    def forward(self, x: Tensor) -> Tensor:
        """The identity: an ``nn.Sequential`` runs all of its children, and the bank is one of them."""
        return x

    # -- who acts --------------------------------------------------------------------------------------

    @property
    def default(self) -> Route:
        """The route when no scope is open: every active adapter that is not disabled, nested in order."""
        return Route.everyone(() if self.off else self.chosen)

    @property
    def chosen(self) -> Owner:
        """The active adapters that are not disabled, in the order in which they nest."""
        return tuple(name for name in self.active if name not in self.disabled)

    def stack(self, names: Sequence[str]) -> None:
        """Which adapters act, and in which order they nest (first innermost), where no scope says otherwise."""
        chosen = self.owner(tuple(names))
        self.active = [*chosen, *(name for name in self.adapters if name not in chosen)]
        self.disabled = set(self.adapters) - set(chosen)

    def __getstate__(self) -> dict[str, Any]:
        """A saved or copied bank forgets generations in progress."""
        return {
            **self.__dict__,
            "known": Known(),
            "_memories": None,
            "_encoded": None,
            "_last": None,
            "_context": None,
            "early": {},
            "_depth": 0,
            "_outermost": [],
            "_open_lean": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._memories = WeakKeyDictionary()

    def owner(self, who: str | Sequence[str] | None) -> Owner:
        """A validated owner from what a user wrote: a name, several names (a stack), or None."""
        names: Owner = () if who is None else (who,) if isinstance(who, str) else tuple(who)
        for name in names:
            self.require(name)
        if len(set(names)) != len(names):
            raise RouteError(f"{list(names)} names an adapter twice.")
        return names

    def acting(
        self, edits: Mapping[str, Sequence[Edit]], owner: Owner, training: bool
    ) -> list[Edit]:
        """Those edits of an owner at one place that act in this forward, innermost first."""
        return [
            edit
            for name in owner
            for edit in edits.get(name, ())
            if edit.block is None or edit.block >= self._first_block(edit, training)
        ]

    def _first_block(self, edit: Edit, training: bool) -> int:
        """The first block in which an adapter acts now."""
        fixed = self.dropped.get(edit.adapter, 0)
        if not (training and edit.method.layer_drop):
            return fixed
        return max(fixed, self.context(training).dropped(edit.adapter, edit.blocks))

    def require(self, name: str) -> Adapter:
        """The adapter of that name, or an error with near names."""
        if name not in self.adapters:
            hint = (
                suggest(name, self.adapters) or f" Attached: {', '.join(self.adapters) or 'none'}."
            )
            raise UnknownNameError(f"no adapter {name!r} is attached.{hint}")
        return self.adapters[name]

    def home(self, name: str) -> nn.Module:
        """The module below which an adapter's model-level tensors lie."""
        return self.homes.get(name, self)

    def lodge(self, name: str, home: nn.Module) -> None:
        """Let a module around the model hold an adapter's model-level tensors, where a library looks for them."""
        self.require(name).move(self.home(name), home)
        self.homes[name] = home

    def admit(self, adapter: Adapter) -> None:
        """Count an adapter among those attached, as the last to act."""
        self.adapters[adapter.name] = adapter
        self.active.append(adapter.name)
        if any(method.needs_prompt for method in adapter.methods):
            self.prompted.add(adapter.name)

    def dismiss(self, name: str) -> None:
        """Forget all that is kept by an adapter's name; one that was not admitted may have left some of it."""
        self.adapters.pop(name, None)
        if name in self.active:
            self.active.remove(name)
        for kept in (self.homes, self.scales, self.dropped):
            kept.pop(name, None)
        self.disabled.discard(name)
        self.prompted.discard(name)

    @contextmanager
    def scope(self, route: Route, plan: Plan | None = None) -> Iterator[None]:
        """Route all forwards inside the ``with``; scopes nest, the innermost holds."""
        before = self._scope, self.plan, self._depth, self._context
        self._scope, self.plan = route, plan
        try:
            yield
        finally:  # the last two: torch closes no forward that a KeyboardInterrupt left
            self._scope, self.plan, self._depth, self._context = before
            if not self._depth:
                self.close()

    def keep_padding(self, modules: Iterable[nn.Module]) -> None:
        """Let torch's own encoders run on padded batches: edits need to know which row a position is of."""
        for module in modules:
            if isinstance(module, nn.TransformerEncoder) and getattr(
                module, "use_nested_tensor", False
            ):
                module.use_nested_tensor = False
                self.padded.append(module)

    # -- contexts --------------------------------------------------------------------------------------

    def context(self, training: bool) -> Context:
        """The context a site is to obey; made on the spot where a part of the model is called alone."""
        if self._context is None:
            return Context(self._scope or self.default, training=training)
        return self._context

    @property
    def opened(self) -> bool:
        """Whether a forward of the whole model is going on, or one of its blocks is recomputed."""
        return self._context is not None

    def recall(self, context: Context, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` run under ``context`` again, if it is not in force (a checkpoint's recomputation)."""

        runs = 0
        drawn: dict[tuple[str, str], int] = {}

        def recalled(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            before, now = (self._context, self._scope), context.drawn
            self._context, self._scope = context, context.route
            context.recomputing, runs = runs > 0, runs + 1
            context.again = {}
            if context.recomputing:
                context.drawn = dict(drawn)
            else:
                drawn.update(now)
            try:
                with context.lean or nullcontext():
                    return function(*args, **kwargs)
            finally:
                self._context, self._scope = before
                context.recomputing, context.drawn = False, now
                self.early.clear()

        return recalled

    def capture(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` bound to the context in force now."""
        return self.recall(self._context or Context(self._scope or self.default), function)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Entry hook: open the context of this forward."""
        if self._depth and self._outermost[0] is module:
            self._depth = 0  # a KeyboardInterrupt left it open
        self._depth += 1
        if self._depth > 1:
            return
        self._outermost[:] = [module]
        self.close()
        try:
            self._context = self._open(module, args, kwargs)
            if leans(module):
                self._open_lean = stack = ExitStack()
                loss = self._context.labels is not None
                self._context.lean = stack.enter_context(lean(module, loss=loss))
        except Exception:
            self._depth -= 1
            raise

    def after(self, module: nn.Module, args: Any, out: Any) -> None:
        """Entry hook: close it, whether the forward returned or raised."""
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self.close()
            states = getattr(out, "last_hidden_state", None)
            if self._context is not None and self._context.memory:
                made = getattr(out, "past_key_values", None)
                if (
                    made is not None and self._context.past is None
                ):  # the model made the cache itself
                    self._memories[made] = self._context.memory
                if isinstance(states, Tensor):
                    self._encoded = (states, self._context.memory)
            self._last = self._context
            self._context = None
            self._outermost[
                :
            ] = []  # as it was before, or a compiled model would be compiled once more

    def close(self) -> None:
        """Let the model be as it was before its forward."""
        self.early.clear()
        if self._open_lean is not None:
            stack, self._open_lean = self._open_lean, None
            stack.close()

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
        for norm in self.norms:  # the base's running statistics are not ours to change
            if norm.training:
                norm.training, self.norms[norm] = False, True
        checkpoint.watch(self)
        batch = _batch(args, kwargs)
        past = kwargs.get("past_key_values")
        route = self._scope or self.default
        rows = None if batch is None else batch.shape[0]
        if rows is not None:
            generating = not module.training and (
                past is not None or kwargs.get("use_cache") is True
            )
            route = route.expanded(rows, generating=generating)
        length = batch.shape[1] if batch is not None and batch.dim() > 1 else None
        plan = self.plan
        return Context(
            route,
            rows=rows,
            length=length,
            mask=kwargs.get("attention_mask") if plan is None else plan.mask,
            prompt=None if plan is None else plan.prompt,
            labels=kwargs.get("labels"),
            decoding=self._decoding(past) if plan is None else plan.decoding,
            training=module.training,
            memory=self._memory(past, kwargs)
            if plan is None or plan.memory is None
            else plan.memory,
            past=past,
            pages=kwargs.get(PAGES),
            ids=_token_ids(batch),
            seeds=NO_SEEDS if plan is None else plan.seeds,
        )

    def _decoding(self, past: Any) -> bool:
        """Whether a prompt lies in the cache; asked only for methods that need to know (it may wait for the device)."""
        return past is not None and bool(self.prompted) and int(past.get_seq_length()) > 0

    def _memory(self, past: Any, kwargs: dict[str, Any]) -> dict[Any, Any]:
        """What gates remember lives as long as the cache of the generation it belongs to."""
        if past is None:
            return self._from_encoder(kwargs)
        if past not in self._memories:
            self._memories[past] = self._from_encoder(kwargs)
        return self._memories[past]

    def _from_encoder(self, kwargs: dict[str, Any]) -> dict[Any, Any]:
        """What was decided when the encoder ran by itself on these very states (beams repeat each row)."""
        given = kwargs.get("encoder_outputs")
        if given is None or self._encoded is None:
            return {}
        states, memory = self._encoded
        new = given[0]
        times = new.shape[0] // states.shape[0]
        same = new is states or (
            new.shape[0] == times * states.shape[0] and torch.equal(new[::times], states)
        )
        return dict(memory) if same else {}

    # -- losses and probes -----------------------------------------------------------------------------

    def take_losses(self, *, but: Collection[str] = ()) -> list[tuple[str, str, Tensor]]:
        """Auxiliary losses of the last forward as (adapter, name, value); taken once. Those named ``but`` stay."""
        losses = self.losses
        if self._last is not None:
            self._last.losses = [loss for loss in losses if loss[1] in but]
        return [loss for loss in losses if loss[1] not in but]

    @property
    def losses(self) -> list[tuple[str, str, Tensor]]:
        """What `take_losses` would take."""
        return [] if self._last is None else list(self._last.losses)

    def fire(self, path: str) -> None:
        """Note that a site was reached, while a probe is listening."""
        if self.fired is not None:
            self.fired.add(path)


def _keep_own(bank: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A state dict of the bare base: the adapters' model-level tensors keep what they hold."""
    own = {f"{prefix}{name}": tensor.detach() for name, tensor in slots.stored(bank).items()}
    if not any(key in state for key in own):
        state.update(own)


class Plan:
    """What the engine knows of a batch beside the route: masks that no argument of the model carries; where it keeps
    what gates remember of a generation, whether the prompt has been read; and what each adapter's random numbers of one
    forward begin from."""

    def __init__(
        self,
        mask: Tensor | None = None,
        prompt: Tensor | None = None,
        *,
        memory: dict[Any, Any] | None = None,
        decoding: bool = False,
        seeds: Mapping[str, int] = NO_SEEDS,
    ) -> None:
        self.mask = mask
        self.prompt = prompt
        self.memory = memory
        self.decoding = decoding
        self.seeds = seeds


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if args and isinstance(args[0], Tensor):
        return args[0]
    for key in _BATCH_KEYS:
        value = kwargs.get(key)
        if isinstance(value, Tensor):
            return value
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    return tensors[0] if tensors else None


def _token_ids(batch: Tensor | None) -> Tensor | None:
    """What a model was called with, if it is (B, T) token ids."""
    tokens = batch is not None and batch.dim() == 2 and not batch.is_floating_point()
    return batch if tokens else None


def bank_of(model: nn.Module) -> Bank:
    """The bank of a model with adapters (also behind DDP, ``torch.compile`` or another wrapper)."""
    found = find_bank(model)
    if found is None:
        raise AttachError(
            f"{type(model).__name__} has no adapters; attach one first: trimtab.attach(model, method, name)."
        )
    return found


def find_bank(model: nn.Module) -> Bank | None:
    """The bank of a model, or None where nothing is attached."""
    from trimtab.adapt.tree import walk

    own = (module._modules.get(CHILD) for module in walk(model))
    return next((module for module in own if isinstance(module, Bank)), None)
