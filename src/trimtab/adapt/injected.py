"""What one forward puts inside attention: keys and values before its own, and gated attentions beside it.

The pre-hook of an attention module hands an `Injected` to the attention function (`trimtab.adapt.attend`) as a keyword.
The virtual tokens of all owners in a batch lie side by side, and each position sees its own owner's only: one rule for
rows, for packed documents and for stacks.

Shapes: B rows, T queries, S keys, U units, P virtual tokens, H heads, G key heads, D head width, C = G · D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from trimtab.adapt.context import Context
from trimtab.adapt.route import Owner, units_at
from trimtab.adapt.stretches import Stretch, stretches
from trimtab.errors import RouteError

KEYWORD = "trimtab_injected"


@dataclass(frozen=True, slots=True)
class Before:
    """Virtual tokens of one owner. ``read`` says that they were read like text, so that windows apply to them."""

    owner: Owner
    keys: Tensor
    """(P, C), or (U, P, C) where each unit has its own."""
    values: Tensor
    read: bool = False


@dataclass(frozen=True, slots=True)
class Beside:
    """A gated attention of its own: (P, C), (P, C), and (1,) or (H,)."""

    owner: Owner
    keys: Tensor
    values: Tensor
    gate: Tensor


class Injected:
    """What one attention gets in one forward."""

    def __init__(self, path: str, context: Context, before: Sequence[Before], beside: Sequence[Beside],
                 bias: nn.Module | None) -> None:  # fmt: skip
        self.path = path
        self.context = context
        self.before = before
        self.beside = beside
        self.bias = bias

    def tokens(self, heads_of: Callable[[Before], Tensor], like_BGSD: Tensor) -> Tensor:
        """(B, G, P, D): keys or values of all owners, side by side."""
        rows, heads, _, width = like_BGSD.shape
        found = []
        for entry in self.before:
            tokens = heads_of(entry).to(like_BGSD.dtype)
            if tokens.dim() == 3 and self.context.route.spans is not None:
                tokens = tokens.flatten(0, 1)
            tokens = tokens.unflatten(-1, (heads, width)).transpose(-3, -2)
            if tokens.dim() == 4 and tokens.shape[0] < rows:  # rows became beams
                tokens = tokens.repeat_interleave(rows // tokens.shape[0], dim=0)
            found.append(tokens.expand(rows, -1, -1, -1))
        return torch.cat(found, dim=2)

    def visible(self, rows: int, length: int, device: torch.device, window: int | None) -> Tensor:
        """(B or 1, 1, T or 1, P), true where a position may see a virtual token: its own owner's."""
        seen = self._of_units([self._seen(entry) for entry in self.before], rows, length).to(device)
        if window is None or not any(entry.read for entry in self.before):
            return seen
        behind = torch.cat([self._behind(entry, device) for entry in self.before])
        positions = self.context.positions
        if positions is None:
            positions = torch.arange(length)[None]
        return seen & (positions.to(device)[:, None, :, None] + behind < window)

    def stretches(self, rows: int, length: int) -> list[Stretch] | None:
        """Rows or tokens by whose virtual tokens they see; None where they cannot be told apart like that."""
        route = self.context.route
        told = {e.owner for e in self.before} | {e.owner for e in self.beside}
        packed = route.spans is not None
        each = {e.owner for e in self.before if packed and e.keys.dim() == 3}
        return stretches(route, rows, length, told, each)

    def of(self, stretch: Stretch) -> Injected:
        """What one of them gets."""
        packed = self.context.route.spans is not None
        units = stretch.unit if packed else slice(stretch.start, stretch.stop)
        before = [
            e if e.keys.dim() == 2 else Before(e.owner, e.keys[units], e.values[units], e.read)
            for e in self.before
            if e.owner == stretch.owner
        ]
        beside = [entry for entry in self.beside if entry.owner == stretch.owner]
        return Injected(self.path, self.context, before, beside, self.bias)

    def owned(self, owner: Owner, rows: int, length: int, device: torch.device) -> Tensor:
        """(B or 1, 1, T or 1, 1), true where that owner acts."""
        mine = torch.tensor([[who == owner] for who in self.context.route.owners])
        return self._of_units([mine], rows, length).to(device)

    def _seen(self, entry: Before) -> Tensor:
        """(U, P), true where a unit sees these tokens."""
        route = self.context.route
        mine = torch.tensor([[who == entry.owner] for who in route.owners])
        count = entry.keys.shape[-2]
        if entry.keys.dim() == 3 and route.spans is not None:
            return (mine & torch.eye(len(mine), dtype=torch.bool)).repeat_interleave(count, dim=1)
        return mine.expand(-1, count)

    def _behind(self, entry: Before, device: torch.device) -> Tensor:
        """(P,) how far each token lies behind position 0 of the text; never, where it has no place."""
        count = entry.keys.shape[-2]
        if not entry.read:
            return torch.full((count,), -(1 << 30), device=device)
        return count - torch.arange(count, device=device)

    def _of_units(self, seen: Sequence[Tensor], rows: int, length: int) -> Tensor:
        route = self.context.route
        table_UP = torch.cat(tuple(seen), dim=1)
        if route.spans is None:
            if len(table_UP) not in (1, rows):
                raise RouteError(
                    f"attention was given {rows} rows, the route names {len(table_UP)} owners."
                )
            return table_UP[:, None, None]
        nobody = table_UP.all(0, keepdim=True) if route.single is not None else table_UP[:1] & False
        return torch.cat([table_UP, nobody])[units_at(route, rows, length)][:, None]

    def widened(self, bias: Tensor) -> Tensor:
        """A bias by distance, with columns for tokens that each lie right before position 0 for their owner."""
        length, keys = bias.shape[-2:]
        if self.bias is None:
            count = sum(entry.keys.shape[-2] for entry in self.before)
            return torch.cat([bias.new_zeros(*bias.shape[:-1], count), bias], dim=-1)
        compute = cast(Callable[..., Tensor], self.bias.compute_bias)
        columns = []
        for owner in dict.fromkeys(entry.owner for entry in self.before):
            width = sum(entry.keys.shape[-2] for entry in self.before if entry.owner == owner)
            past = keys - length + width
            whole = compute(length, keys + width, device=bias.device, past_seen_tokens=past)
            columns.append(whole[..., :width].to(bias.dtype).expand(*bias.shape[:-1], width))
        return torch.cat([*columns, bias], dim=-1)
