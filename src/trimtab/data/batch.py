"""Datums to the tensors that a model sees: packed rows, or one padded row for each datum.

Packing puts whole documents one after the other in a row, so that nothing is spent on padding. They
are kept apart by `position_ids` alone, which restart at 0 with each document: `transformers` (from
5.0, `masking_utils.find_packed_sequence_indices`) builds the block-causal mask from them, and takes
the fast causal path where each row is one run. So packed rows carry no attention mask. That holds for
decoders; encoders get padded rows with a mask.

Legend: B rows, T tokens in a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.data.datum import Datum
from trimtab.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """Where one datum lies: tokens ``start`` to ``stop`` of ``row``; ``index`` is its place in the input."""

    row: int
    start: int
    stop: int
    index: int


@dataclass(frozen=True)
class Batch:
    """What the model sees.

    ``input_ids``, ``position_ids`` and ``targets`` are (B, T) int64, ``weights`` is (B, T) float32 with
    0 wherever nothing is learnt (padding included). ``documents`` are in the order of their rows, and
    of their start within a row; padding belongs to none. ``attention_mask`` is None for packed rows and
    (B, T) int64 for padded ones. Position ids count from 0; an encoder that numbers its own way
    (RoBERTa) should be called without them.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    weights: Tensor
    documents: tuple[Document, ...]
    attention_mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of documents, padding left out."""
        return sum(document.stop - document.start for document in self.documents)

    @property
    def padding(self) -> float:
        """The fraction of the (B, T) cells that is padding."""
        return 1.0 - self.tokens / self.input_ids.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
        )


def collate(
    data: Sequence[Datum],
    *,
    pad_id: int,
    packed: bool = True,
    row_tokens: int | None = None,
    groups: Sequence[Hashable] | None = None,
) -> Batch:
    """One batch of all ``data``.

    ``packed``: documents share rows of at most ``row_tokens`` tokens (None: one row for each group);
    otherwise each datum has a row of its own and an attention mask. ``groups[i]`` (the owner of datum i,
    say) keeps data of different groups in different rows, and the rows of one group side by side.
    ``pad_id`` only fills cells: which tokens are trained is told by the weights, never by the id.

    Raises `DataError` for no data, or for a datum longer than ``row_tokens``.
    """
    if not data:
        raise DataError("cannot collate a batch of no data.")
    lengths = [len(datum) for datum in data]
    if row_tokens is not None:
        _check_fit(data, row_tokens)
    if not packed:
        return _fill(data, _padded_rows(len(data), groups), pad_id, masked=True)
    rows: list[list[int]] = []
    for members in _by_group(len(data), groups):
        budget = sum(lengths[index] for index in members) if row_tokens is None else row_tokens
        local = pack([lengths[index] for index in members], budget)
        rows += [[members[place] for place in row] for row in local]
    return _fill(data, rows, pad_id, masked=False)


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of ``lengths`` by row: best-fit decreasing, no document split, no row over ``row_tokens``.

    Deterministic; within a row indices ascend, and rows are in the order of their first index.
    Raises `DataError` for a length that no row can hold.
    """
    rows: list[list[int]] = []
    room: list[
        tuple[int, int]
    ] = []  # (tokens left, row), ascending: the tightest fit is found first
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > row_tokens:
            raise DataError(f"a document of {length} tokens does not fit a row of {row_tokens}.")
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - length, row))
    return sorted(sorted(row) for row in rows)


def plan_batches(
    lengths: Sequence[int], max_tokens: int, *, packed: bool = False, each: int | None = None
) -> list[list[int]]:
    """Indices of ``lengths`` by micro-batch, each of at most ``max_tokens`` cells.

    Padded: rows times the longest row counts, so data of like length go together (longest first, so that what does
    not fit in memory shows at once), in the batches that cost least: a batch costs its cells and ``each`` more (by
    default as many as it may have, so that there are few). ``packed``: the sum of the lengths counts. Every index
    occurs once; deterministic. Raises `DataError` for a length over ``max_tokens``.
    """
    if packed:
        return pack(lengths, max_tokens)
    each = max_tokens if each is None else each
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > max_tokens:
        raise DataError(
            f"example {order[0]} has {lengths[order[0]]} tokens, more than a micro-batch may have "
            f"({max_tokens}); raise that limit or shorten the example."
        )
    least, begins = (
        [0],
        [0],
    )  # cost of the first so many in order, and where the last batch of them begins
    for stop in range(1, len(order) + 1):
        ways = []
        for start in range(stop - 1, -1, -1):
            cells = lengths[order[start]] * (stop - start)
            if cells > max_tokens:
                break
            ways.append((least[start] + cells + each, start))
        best, start = min(ways)
        least.append(best)
        begins.append(start)
    batches, stop = [], len(order)
    while stop:
        batches.append(order[begins[stop] : stop])
        stop = begins[stop]
    return batches[::-1]


def _check_fit(data: Sequence[Datum], row_tokens: int) -> None:
    for datum in data:
        if len(datum) > row_tokens:
            raise DataError(
                f"{datum.origin or 'a datum'} has {len(datum)} tokens, more than a row of {row_tokens}; "
                "make rows longer, or choose how to truncate when the data are loaded."
            )


def _by_group(count: int, groups: Sequence[Hashable] | None) -> list[list[int]]:
    if groups is None:
        return [list(range(count))]
    if len(groups) != count:
        raise DataError(f"{len(groups)} groups were given for {count} data.")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return list(members.values())


def _padded_rows(count: int, groups: Sequence[Hashable] | None) -> list[list[int]]:
    return [[index] for members in _by_group(count, groups) for index in members]


def _fill(data: Sequence[Datum], rows: list[list[int]], pad_id: int, *, masked: bool) -> Batch:
    width = max(sum(len(data[index]) for index in row) for row in rows)
    longest = max(len(datum) for datum in data)
    ids, targets, weights, positions, documents = [], [], [], [], []
    for number, row in enumerate(rows):
        row_ids: list[int] = []
        row_targets: list[int] = []
        row_weights: list[float] = []
        row_positions: list[int] = []
        for index in row:
            start = len(row_ids)
            row_ids += data[index].tokens
            row_targets += data[index].targets
            row_weights += data[index].weights
            row_positions += range(len(data[index]))
            documents.append(Document(number, start, len(row_ids), index))
        blank = width - len(row_ids)
        ids.append(row_ids + [pad_id] * blank)
        targets.append(row_targets + [pad_id] * blank)
        weights.append(row_weights + [0.0] * blank)
        positions.append(row_positions + _padding_positions(len(row), len(row_ids), blank, longest))
    mask = None
    if masked:
        filled = torch.tensor([sum(len(data[i]) for i in row) for row in rows])
        mask = (torch.arange(width) < filled[:, None]).long()
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        documents=tuple(documents),
        attention_mask=mask,
    )


def _padding_positions(count: int, filled: int, blank: int, longest: int) -> list[int]:
    """Positions of the padding that ends a row; all below the longest document's length.

    After several documents the padding is a document of nobody: its positions restart, as often as it
    takes for a learnt position table to hold them. After a single document they run on: a causal model
    cannot look ahead, and a batch of such rows then needs no mask at all.
    """
    if count == 1:
        return [place % longest for place in range(filled, filled + blank)]
    return [place % longest for place in range(blank)]
