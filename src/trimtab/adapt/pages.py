"""Keys and values in pages: what attention writes and reads when many texts of any length are served together.

A model is called without a cache of its own and hands `Pages` on to its attention, by keyword, as it does with
`Documents`. Attention writes the new tokens' keys and values into the pages of their texts and reads them from there:
one new token for each row (decoding), or tokens of several texts in one row (reading prompts, whole or in pieces).

What sequence methods put before a text is written once, in the first positions of its pages, and is then like tokens
that were read before.

Legend: B rows, T tokens of a row, H query heads, G key heads, D head width, P pages, S positions of a page, N new
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UnsupportedError
from trimtab.kernels.attention import blocked_attention
from trimtab.kernels.paged import Entries, paged_attention

if TYPE_CHECKING:
    from trimtab.adapt.injected import Injected

SIZE = 32
"""Positions of a page."""


class Store:
    """The pages of all layers; a layer's are made when it first writes, for the heads that it has."""

    def __init__(self, pages: int, size: int = SIZE) -> None:
        self.pages = pages
        self.size = size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """(P, G, S, D): keys and values of a layer that writes such ones."""
        if layer not in self._layers:
            self._layers[layer] = self._made(key_BGTD), self._made(value_BGTD)
        return self._layers[layer]

    def _made(self, like: Tensor) -> Tensor:
        shape = self.pages, like.shape[1], self.size, like.shape[-1]
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        # numpy asks the system for zeros, which takes memory for the pages alone that are written
        zeros = numpy.zeros(math.prod(shape) * like.itemsize, numpy.uint8)
        return torch.from_numpy(zeros).view(like.dtype).view(shape)

    def clear(self, pages: Sequence[int]) -> None:
        """Zeros in these pages."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[list(pages)] = 0

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for pair in self._layers.values() for t in pair)


@dataclass(frozen=True, slots=True)
class Unit:
    """One text in one forward: its pages, in which ``before`` positions are filled; ``lead`` virtual tokens that this
    forward writes, and ``count`` tokens that it reads."""

    pages: Sequence[int]
    before: int
    count: int
    lead: int = 0

    @property
    def start(self) -> int:
        """Where its tokens go."""
        return self.before + self.lead

    @property
    def stop(self) -> int:
        return self.start + self.count


class Pages:
    """One forward's view of a store. ``decoding``: each row is a unit's one token; else all tokens are one row, the
    units' one after another."""

    def __init__(self, store: Store, units: Sequence[Unit], *, decoding: bool) -> None:
        self.store = store
        self.units = units
        self.decoding = decoding
        self.longest = max(unit.stop for unit in units)
        self._places: tuple[Tensor, Tensor] | None = None
        self._entries: dict[int | None, Entries] = {}

    @property
    def filling(self) -> bool:
        """Whether this forward writes what stands before some text."""
        return any(unit.lead for unit in self.units)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        injected: Injected | None, scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        """(B, T, H, D): the new tokens' attention; their keys and values are in the pages then."""
        keys, values = self.store.of(int(module.__dict__["layer_idx"]), key, value)
        if self.filling:
            self._fill(keys, values, injected)
        pages, offsets = self._written(key.device)
        keys[pages, :, offsets] = _by_token(key)
        values[pages, :, offsets] = _by_token(value)
        if window is not None and window >= self.longest:
            window = None
        if self.decoding:
            if window not in self._entries:
                self._entries[window] = self._readers(key, window)
            entries = self._entries[window]
            return paged_attention(query[:, :, 0], keys, values, entries, scale)[:, None]
        parts = self._read(query, key, value, (keys, values), scale, window)
        return torch.cat(list(parts), dim=1)

    def _readers(self, like: Tensor, window: int | None) -> Entries:
        tables, lengths = [unit.pages for unit in self.units], [unit.stop for unit in self.units]
        return Entries.of(tables, lengths, self.store.size, like, window)

    def _written(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(N,) the page of each new token, and its place there."""
        if self._places is None:
            places = [
                p
                for unit in self.units
                for p in _places(unit, unit.start, unit.stop, self.store.size)
            ]
            self._places = _tensors(places, device)
        return self._places

    def _fill(self, keys: Tensor, values: Tensor, injected: Injected | None) -> None:
        """Write what stands before the texts."""
        before = () if injected is None else injected.before
        owners = () if injected is None else injected.context.route.owners
        for number, unit in enumerate(self.units):
            if not unit.lead:
                continue
            owner = owners[number if len(owners) > 1 else 0] if owners else None
            own = [entry for entry in before if entry.owner == owner]
            places = _places(unit, unit.before, unit.start, self.store.size)
            pages, offsets = _tensors(places, keys.device)
            for into, tokens in (
                (keys, [_of_unit(entry.keys, number) for entry in own]),
                (values, [_of_unit(entry.values, number) for entry in own]),
            ):
                count = sum(map(len, tokens))
                if count != unit.lead:
                    raise UnsupportedError(
                        f"{unit.lead} virtual tokens stand before the text and this attention was given {count}; "
                        "an adapter that acts in some of the attentions only cannot be served from pages."
                    )
                shaped = torch.cat(tokens).unflatten(-1, (into.shape[1], into.shape[3]))
                into[pages, :, offsets] = shaped.to(into.dtype)

    def _read(
        self, query: Tensor, key: Tensor, value: Tensor, pages: tuple[Tensor, Tensor],
        scale: float, window: int | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """(1, T, H, D) by pieces: texts that nothing stands before are one, each of the others is one."""
        start = 0
        ends: list[int] = []

        def fresh() -> Iterator[Tensor]:
            if ends:
                here = slice(start, ends[-1])
                q, k, v = (t[:, :, here] for t in (query, key, value))
                yield _documents(q, k, v, scale, [end - start for end in ends], window)

        place = 0
        for unit in self.units:
            end = place + unit.count
            if unit.start:
                yield from fresh()
                table = torch.tensor(unit.pages, device=key.device)
                k, v = (_text(t, table, unit.stop) for t in pages)
                yield _behind(query[:, :, place:end], k, v, scale, window)
                start, ends = end, []
            else:
                ends.append(end)
            place = end
        yield from fresh()


def _by_token(x_BGTD: Tensor) -> Tensor:
    """(N, G, D)."""
    return x_BGTD.transpose(1, 2).flatten(0, 1)


def _of_unit(tokens: Tensor, number: int) -> Tensor:
    """(P, C) of a unit, from those of all or of each."""
    return tokens if tokens.dim() == 2 else tokens[number]


def _places(unit: Unit, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """The page of each of a unit's positions, and the place there."""
    return [(unit.pages[place // size], place % size) for place in range(start, stop)]


def _tensors(places: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    pages, offsets = torch.tensor(places).unbind(1)
    return pages.to(device), offsets.to(device)


def _text(pages_PGSD: Tensor, table: Tensor, length: int) -> Tensor:
    """(1, G, length, D): one text's, in a row."""
    return pages_PGSD[table].transpose(0, 1).flatten(1, 2)[None, :, :length]


def _documents(
    query: Tensor, key: Tensor, value: Tensor, scale: float, ends: list[int], window: int | None
) -> Tensor:
    """(1, T, H, D): texts side by side, each from its beginning."""
    if query.device.type == "cpu" and window is None:
        return blocked_attention(query, key, value, scale, ends)
    found = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        q, k, v = (t[:, :, start:end] for t in (query, key, value))
        found.append(_behind(q, k, v, scale, window))
    return torch.cat(found, dim=1)


def _behind(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """(1, T, H, D): the last T tokens of a text."""
    length, whole = query.shape[2], key.shape[2]
    if query.device.type == "cpu" and window is None:
        return blocked_attention(query, key, value, scale, lead=whole - length)
    places = torch.arange(whole, device=query.device)
    distance = places[whole - length :, None] - places
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)
