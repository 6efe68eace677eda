"""Who acts: for a scope, for each row, and where no scope is open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from trimtab.adapt.bank import bank_of
from trimtab.adapt.route import Route
from trimtab.adapt.tree import anatomy_of, uncover
from trimtab.errors import (
    ConfigError,
    RouteError,
    TargetError,
)


@contextmanager
def using(model: nn.Module, who: str | Sequence[str] | None) -> Iterator[None]:
    """One adapter (or a stack of several, or None: the bare base) for every row, inside the ``with``."""
    bank = bank_of(model)
    with bank.scope(Route.everyone(bank.owner(who))):
        yield


@contextmanager
def rows(model: nn.Module, owners: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """One adapter (or stack, or None) per row of the batch, in any mix of methods."""
    bank = bank_of(model)
    if isinstance(owners, str):
        raise RouteError(
            f"rows takes one name per row, not the text {owners!r}; use using() for one adapter."
        )
    with bank.scope(Route(tuple(bank.owner(who) for who in owners))):
        yield


def enable(model: nn.Module, name: str) -> None:
    """Let an attached adapter act again where no scope says otherwise."""
    bank = bank_of(model)
    bank.require(name)
    bank.disabled.discard(name)


def disable(model: nn.Module, name: str) -> None:
    """Keep an attached adapter from acting where no scope says otherwise."""
    bank = bank_of(model)
    bank.require(name)
    bank.disabled.add(name)


def scale(model: nn.Module, name: str, factor: float) -> None:
    """Set how far an adapter's edits go: 0 is the base, 1 the adapter as trained. Weights merged in place with
    another scale are dropped."""
    bank = bank_of(model)
    adapter = bank.require(name)
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        raise ConfigError(f"scale of {name!r} must be a finite number, not {factor!r}.")
    if factor != 1.0 and any(m.virtual_tokens + m.prompt_tokens for m in adapter.methods):
        raise TargetError(
            f"adapter {name!r} puts virtual tokens before the text; there is no scaled form of that."
        )
    if name in bank.merged:
        uncover(model, bank)
    bank.scales[name] = float(factor)


def drop_layers(model: nn.Module, name: str, count: int) -> None:
    """Leave an adapter's edits out of the first ``count`` blocks, at no cost (AdapterDrop); 0 brings them back.

    Blocks are counted as ``layers`` of a method counts them. Merging leaves them out too.
    """
    bank = bank_of(model)
    adapter = bank.require(name)
    blocks = len(anatomy_of(model).blocks)
    if not isinstance(count, int) or not 0 <= count <= blocks:
        raise ConfigError(f"{name!r} can be left out of 0 to {blocks} blocks, not {count!r}.")
    if count and any(method.overrides("virtual_embeddings") for method in adapter.methods):
        raise TargetError(
            f"adapter {name!r} stands before the text, in no block, so it cannot be left out by block."
        )
    if name in bank.merged:
        uncover(model, bank)
    bank.dropped[name] = count


def stack(model: nn.Module, names: Sequence[str]) -> None:
    """Which adapters act, and in which order they nest (first innermost), where no scope says otherwise."""
    bank_of(model).stack(names)
