"""One place of the frozen model where adapters may act.

`Site` wraps a layer (or a sub-layer whose output is edited), `ExpertsSite` the experts of a mixture.
Both hold the adapter tensors of that place and ask the bank's context who acts. The wrapped layer is
the child ``base_layer``, but ``state_dict`` names are those of the bare model: the segment is taken
out on the way out and put back on the way in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from trimtab.adapt import fusing
from trimtab.adapt.at import Around, At
from trimtab.adapt.context import Context
from trimtab.adapt.edit import Bound, Edit, enter, leave
from trimtab.adapt.looks import Looks
from trimtab.adapt.route import Layout, Owner, Part
from trimtab.adapt.slots import Slot, stored, tidy
from trimtab.errors import TargetError
from trimtab.frozen import Layer, view
from trimtab.frozen.experts import ExpertLayer, run
from trimtab.frozen.sublayer import SubLayer
from trimtab.kernels.lowrank import Inside

if TYPE_CHECKING:
    from trimtab.adapt.bank import Bank

BASE = "base_layer"
ORIGINAL = "original_module"
WRAPPED = (BASE, ORIGINAL)
"""What the wrapped layer is called in a site: by PEFT's names, the latter where it is trained in full."""


class SiteBase(Looks, nn.Module):
    """What all kinds share: edits by adapter, names, and looking like the wrapped layer. Abstract."""

    child: str = BASE

    def __init__(self, base_layer: nn.Module, path: str, bank: Bank) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        # In a tuple, so that torch does not register the bank as a child of every site.
        self._bank = (bank,)
        self._covered: tuple[nn.Module, ...] = ()
        self.edits: dict[str, list[Edit]] = {}
        """Of each adapter, innermost first; changed by `add` and `withdraw` alone."""
        self.room: Inside = nullcontext
        """Where the frozen layer computes (`trimtab.train.profiler` times what happens there)."""
        self.train(base_layer.training)
        self.register_state_dict_post_hook(_hide_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_show_base)  # type: ignore[no-untyped-call]

    @property
    def bank(self) -> Bank:
        return self._bank[0]

    @property
    def slots(self) -> nn.Module:
        """The module below which the tensors of this place lie."""
        return self

    @property
    def frozen(self) -> nn.Module:
        """The wrapped layer; ``base_layer`` is another while merged weights stand in its place."""
        return self._covered[0] if self._covered else self.base_layer

    def cover(self, layer: nn.Module) -> None:
        """Let a merged layer stand in the place of the frozen one."""
        self._covered = (self.base_layer,)
        self.base_layer = layer

    def uncover(self) -> None:
        """The frozen layer again, on the device that the model is on by now."""
        if self._covered:
            here = next(self.base_layer.parameters()).device
            self.base_layer, self._covered = self._covered[0].to(here), ()

    def covers(self, parts: Sequence[Part]) -> bool:
        """Whether the merged layer computes what all these owners ask for."""
        return bool(self._covered) and all(part.owner == self.bank.merged for part in parts)

    def release(self) -> nn.Module:
        """The wrapped layer, as it was; the site is of no more use then."""
        self.uncover()
        return self.base_layer

    def bare(self) -> bool:
        """Whether no adapter has an edit here."""
        return not self.edits

    def add(self, edit: Edit) -> nn.Module:
        """Let an edit act here; returns the module below which its tensors are to lie."""
        self.edits.setdefault(edit.adapter, []).append(edit)
        return self.slots

    def withdraw(self, adapter: str) -> list[Edit]:
        """Take an adapter's edits out, and return them."""
        return self.edits.pop(adapter, [])

    def acting(self, owner: Owner, *, training: bool = False) -> list[Edit]:
        """The edits of an owner at this site, innermost first."""
        return self.bank.acting(self.edits, owner, training)

    def bind(self, edits: Sequence[Edit], layer: Layer, context: Context, part: Part, dtype: torch.dtype,
             holder: nn.Module | None = None, expert: int | None = None) -> list[Bound]:  # fmt: skip
        """The edits with their tensors for one call; ``expert`` picks one slice of stacked tensors."""
        bank = self.bank
        bound = []
        for edit in edits:
            cast = partial(self._cast, edit, holder or self.slots, expert)
            home = bank.home(edit.adapter)
            call = At(edit, layer, context, part, home, dtype, self.training)
            call.holder = edit.home or holder or self.slots if expert is None else None
            scale = bank.scales.get(edit.adapter, 1.0) * edit.scale
            bound.append(Bound(edit, cast, scale, call))
        return bound

    def _cast(
        self, edit: Edit, holder: nn.Module, expert: int | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        params = edit.params(holder, dtype)
        return params if expert is None else {short: t[expert] for short, t in params.items()}

    # A site stands in for its layer: code that peeks at `weight`, or ties it, sees the layer's own.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # how a layer copies itself is not how a site does
                raise
            base = self._wrapped()
            if base is None:
                raise
            return getattr(base, name)

    def own_name(self, parts: list[str]) -> list[str]:
        """A name below the site in the tree -> in a state dict, which has those of the bare model."""
        child = self.child.split(".")
        return parts[len(child) :] if parts[: len(child)] == child else parts

    def held(self) -> dict[str, Tensor]:
        """What a state dict holds of the tensors of this place, by name."""
        inner = f"{self.child}."
        return {n: t.detach() for n, t in stored(self).items() if not n.startswith(inner)}

    def _wrapped(self) -> nn.Module | None:
        """The wrapped layer, once there is one."""
        modules = self.__dict__.get("_modules", {})
        found: nn.Module | None = modules.get(self.child)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        base = self._wrapped()
        if base is not None and name in base._parameters:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


class LayerSite(SiteBase):
    """A wrapped layer, abstract: ``y = leave( f( enter(x) ) + delta(x) )`` for whoever acts on each row.

    The output of a sub-layer is edited by a hook on it, before the hooks of others: those by which transformers
    records hidden states see what the model goes on with.
    """

    def __init__(
        self, base_layer: nn.Module, path: str, bank: Bank, width: int, root: nn.Module
    ) -> None:
        super().__init__(base_layer, path, bank)
        self.layer: Layer = view(base_layer, root) or SubLayer(base_layer, width)
        self.siblings: tuple[LayerSite, ...] = ()
        """Other layers that are called with the same x, after this one (`trimtab.adapt.fusing`)."""
        self._entered: tuple[list[list[Bound]], Layout] | None = None
        self._entering = 0
        """How many edits change what goes in."""
        self._hook: Any = None
        self._hooked = self.layer.kind == "sublayer"
        if self._hooked:
            self._hook = base_layer.register_forward_hook(
                self._edited, with_kwargs=True, prepend=True
            )

    def release(self) -> nn.Module:
        if self._hook is not None:
            self._hook.remove()
        return super().release()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bank = self.bank
        bank.fire(self.path)
        x, call = self._input(args, kwargs)
        if self._hooked and not self._entering:
            return self.base_layer(*args, **kwargs)
        alone = len(args) == 1 and not kwargs
        if alone and bank.early and (done := fusing.early(self, x)) is not None:
            return done
        if alone and bank.stacked and (made := bank.stacked.output(self, x)) is not None:
            return made
        stacks, split, x = self.stacks(x)
        if not any(stacks):
            with self.room():
                covered = self.covers(split.parts)
                return (self.base_layer if covered else self.frozen)(*args, **kwargs)
        pieces = [part.take(x) for part in split.parts]
        entered = [enter(stack, piece) for stack, piece in zip(stacks, pieces, strict=True)]
        changed = any(new is not old for new, old in zip(entered, pieces, strict=True))
        given = split.join(entered) if changed else x
        if not self._hooked:
            if alone and not changed:
                made = fusing.output(self, x, split, stacks)
                if made is not None:
                    return made
            with self.room():
                y = call(given)
            return self._after(stacks, split, y)
        if changed:  # the hook must know what was given before
            self._entered = stacks, split
        return call(given)

    def add(self, edit: Edit) -> nn.Module:
        self._entering += edit.enters
        return super().add(edit)

    def withdraw(self, adapter: str) -> list[Edit]:
        found = super().withdraw(adapter)
        self._entering -= sum(edit.enters for edit in found)
        return found

    def stacks(self, x: Tensor) -> tuple[list[list[Bound]], Layout, Tensor]:
        """Whose edits act on which part of x; and x with rows as the batch has them."""
        context = self.bank.context(self.training)
        if self.layer.kind == "embedding":
            x = context.for_each_row(x)
        split = context.layout(x)
        if self.covers(split.parts):
            return [], split, x
        acting = [self.acting(part.owner, training=self.training) for part in split.parts]
        if not any(acting):
            return [], split, x
        dtype = self.layer.compute_dtype(x)
        stacks = [
            self.bind(edits, self.layer, context, part, dtype)
            for edits, part in zip(acting, split.parts, strict=True)
        ]
        return stacks, split, x

    def _edited(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """The hook: what a sub-layer gives, edited."""
        if self._entered is not None:
            (stacks, split), self._entered = self._entered, None
            return self._after(stacks, split, out)
        stacks, split, x = self.stacks(self._input(args, kwargs)[0])
        for stack, part in zip(stacks, split.parts, strict=False):
            for bound in stack:
                bound.call.x = part.take(x)
        return self._after(stacks, split, out) if stacks else out

    def _after(self, stacks: Sequence[Sequence[Bound]], split: Layout, out: Any) -> Any:
        y, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        y = self._leave(stacks, split, y)
        return y if rest is None else (y, *rest)

    def _leave(self, stacks: Sequence[Sequence[Bound]], split: Layout, y: Tensor) -> Tensor:
        if split.whole:
            return leave(stacks[0], y)
        left = [leave(stack, part.take(y)) for stack, part in zip(stacks, split.parts, strict=True)]
        return split.join(left)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The tensor that edits see, and a function that calls the layer with another in its place."""
        if args:
            return args[0], lambda x: self.frozen(x, *args[1:], **kwargs)
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                return value, lambda x, key=key: self.frozen(**{**kwargs, key: x})
        raise TargetError(f"{self.path} was called without a tensor; it cannot hold an adapter.")


@final
class Site(LayerSite):
    """A layer that adapters edit."""


class ExpertsSite(SiteBase):
    """Wrapped experts of a mixture. Each 3-D parameter is a site: its tensors lie in the child of that name."""

    def __init__(self, base_layer: nn.Module, path: str, bank: Bank) -> None:
        super().__init__(base_layer, path, bank)
        self._paths = Counter[str]()
        """How many edits there are of each parameter."""

    def add(self, edit: Edit) -> nn.Module:
        super().add(edit)
        self._paths[edit.path] += 1
        return self._holder(edit.path.rpartition(".")[2])

    def withdraw(self, adapter: str) -> list[Edit]:
        found = super().withdraw(adapter)
        for edit in found:
            self._paths[edit.path] -= 1
            tidy(self, edit.path.rpartition(".")[2])
        return found

    def forward(self, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        bank = self.bank
        context = bank.context(self.training)
        split = context.layout(hidden_NH)
        if self.covers(split.parts):
            y: Tensor = self.base_layer(hidden_NH, index_NK, weights_NK)
            return y
        for name in +self._paths:
            bank.fire(name)
        pieces = []
        places = torch.arange(hidden_NH.shape[0], device=hidden_NH.device)
        for part in split.parts:
            inputs = part.take(hidden_NH), part.take(index_NK), part.take(weights_NK)
            if self.acting(part.owner, training=self.training):
                whole = _whole(part, part.take(places), context)
                pieces.append(self._edited(whole, context, *inputs))
            else:
                pieces.append(self.frozen(*inputs))
        return split.join(pieces)

    def _edited(
        self, part: Part, context: Context, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        edits = self.acting(part.owner, training=self.training)
        given = Around(part, hidden)

        def around(name: str, expert: int, layer: ExpertLayer, x: Tensor, tokens: Tensor) -> Tensor:
            here = [edit for edit in edits if edit.path == f"{self.path}.{name}"]
            if not here:
                return layer.call(x)
            own = _some(part, tokens)
            stack = self.bind(here, layer, context, own, x.dtype, self.get_submodule(name), expert)
            for bound in stack:
                bound.call.around = given
            return leave(stack, layer.call(enter(stack, x)))

        return run(self.frozen, hidden, index, weights, around)

    def _holder(self, parameter: str) -> nn.Module:
        """The module that holds the adapter tensors of one expert parameter."""
        if parameter not in self._modules:
            self._modules[parameter] = Slot(self)
        return self.get_submodule(parameter)


def _whole(part: Part, places: Tensor, context: Context) -> Part:
    """A part of the flattened tokens, each with its unit and its place among all tokens."""
    units, count = part.units, part.unit_count
    if units is None:
        count = part.unit_count if context.rows is None else context.rows
        units = places // max(places.shape[0] // count, 1)
    return Part(part.owner, places, units, True, count)


def _some(part: Part, tokens: Tensor) -> Part:
    """Some tokens of such a part."""
    if part.units is None or not isinstance(part.index, Tensor):
        raise AssertionError("made by _whole")
    return Part(part.owner, part.index[tokens], part.units[tokens], True, part.unit_count)


def _hide_base(site: SiteBase, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}{site.child}."
    own = list(
        takewhile(lambda key: key.startswith(prefix), reversed(state))
    )  # the site's are the newest keys
    for key in own[::-1]:
        value = state.pop(key)  # popped and put back, so that the order stays the model's own
        state[prefix + key[len(inner) :] if key.startswith(inner) else key] = value


def _show_base(site: SiteBase, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = {f"{prefix}{name}": tensor for name, tensor in site.held().items()}
    nested = {key for key in own if key in state}
    for key in [key for key in state if key.startswith(prefix) and key not in own]:
        state[f"{prefix}{site.child}.{key[len(prefix) :]}"] = state.pop(key)
    if not nested:  # a state dict of the bare base: the adapters keep what they hold
        state.update(own)
