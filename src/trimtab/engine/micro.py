"""Micro-batches: which data are shown to the model together, and in what layout.

A decoder may see documents as *rows* (one each, padded on the right; no mask is needed, since causal
attention never looks right) or *packed* (several in a row, kept apart by their positions). Packing
wastes no cell. Where attention can be told of the documents (`DOCUMENTS`) each costs what it costs alone; elsewhere it
runs under a dense mask over the row. Which layout is cheaper depends on the lengths, so both are planned and the
cheaper is taken:

    cost = cells + Σ a · R² / R0 + E · batches,   over rows of R cells, a = ½ where attention is plainly causal, else 1

(over documents instead of rows, where attention is told of them), with R0 the row length at which masked attention
costs as much as the layers (from the model's widths), and E the cells that would take as long as what a micro-batch
costs whatever its size. Anything that is not a decoder gets padded rows with a mask, which attention that can be told
of documents does not need; rows of like length share a micro-batch, as far as E lets that pay.

Documents of several owners share a row only where attention is told of them: under a mask, what is not finite in one
document would reach the others. Those of an owner follow one another, in one row for each micro-batch.

Legend: R cells of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.adapt.documents import DOCUMENTS, Documents
from trimtab.adapt.route import Route, Span
from trimtab.data import Batch, Datum, collate, pack, plan_batches
from trimtab.engine.separating import separates
from trimtab.errors import DataError

Who = str | None
"""An adapter's name, or None: the bare base."""

IDLE = {"cpu": 7.5e8, "cuda": 1.5e12}
"""Operations on matrices that a device could do in the time that a block of a model costs beside those."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch. ``members[d]`` is the index in the data of the batch's document d, and ``owners[d]``
    its adapter; ``prompt`` (B, T) is true where a gate may look; ``masked`` whether padding needs a mask;
    ``apart`` are its documents, where attention is to be told of them."""

    batch: Batch
    members: tuple[int, ...]
    owners: tuple[Who, ...]
    prompt: Tensor
    packed: bool
    masked: bool
    apart: Documents | None = None

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the model; ``batch`` is this micro-batch's, on the model's device."""
        found: dict[str, Any] = {"input_ids": batch.input_ids}
        if self.apart is not None:
            found[DOCUMENTS] = self.apart
        if self.packed:
            found["position_ids"] = batch.position_ids
        if self.masked and batch.attention_mask is not None:
            found["attention_mask"] = batch.attention_mask
        return found

    def route(self, *, per_document: bool) -> Route:
        """Who acts where; one owner of everything unless ``per_document`` says that units matter."""
        owners = tuple(() if owner is None else (owner,) for owner in self.owners)
        if not per_document and len(set(owners)) == 1:
            return Route.everyone(owners[0])
        spans = tuple(Span(d.row, d.start, d.stop) for d in self.batch.documents)
        return Route(owners, spans if self.packed else None)


@dataclass(frozen=True)
class Layout:
    """How this model may be shown data.

    Args:
        packs: documents may share rows (verified, see `separates`).
        apart: attention can be told of them (verified likewise).
        causal: padding on the right needs no mask.
        balance: R0 of the module's cost.
        each: E of it.
    """

    packs: bool
    apart: bool
    causal: bool
    balance: float
    each: int
    pad_id: int

    def plan(
        self,
        data: Sequence[Datum],
        owners: Sequence[Who],
        budget: int,
        packed: bool | None = None,
        units: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Micro]:
        """Micro-batches of at most ``budget`` cells, that together hold each datum once.

        ``packed`` forces one of the two layouts; ``units`` are data that must be seen together (by default each is
        one). Raises `DataError` for a datum, or a unit, over the budget.
        """
        lengths = [len(datum) for datum in data]
        units = units or [(index,) for index in range(len(data))]
        check_fit(data, units, budget)
        rows = self._row_plan(lengths, units, budget)
        several = len(set(owners)) > 1 or len(units) < len(data)
        if packed is False or not self.packs or (several and not self.apart):
            return self._rows(data, owners, rows)
        plainly = float("inf") if packed else self._rows_cost(lengths, rows)
        if several:
            own = [sum(lengths[index] for index in unit) for unit in units]
            chosen = pack(own, budget)
            cost = sum(self._cost(length, length) for length in lengths) + len(chosen) * self.each
            if plainly <= cost:
                return self._rows(data, owners, rows)
            return self._joined(
                data, owners, [[i for u in row for i in units[u]] for row in chosen]
            )
        costs = {0: plainly}  # by the width of packed rows; 0 stands for rows of one document
        for width in sorted({min(max(lengths) * times, budget) for times in (1, 2, 4, budget)}):
            count = len(pack(lengths, width))
            cells = count * width
            alone = cells - sum(lengths) + sum(self._cost(length, length) for length in lengths)
            costs[width] = alone if self.apart else self._cost(cells, 2 * width)
            costs[width] += -(-count // max(budget // width, 1)) * self.each
        best = min(costs, key=lambda width: costs[width])
        if best == 0:
            return self._rows(data, owners, rows)
        return self._packed(data, owners, lengths, best, budget)

    def _rows_cost(self, lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> float:
        """Of micro-batches in which each datum has a row."""
        widths = [max(lengths[index] for index in members) for members in rows]
        pairs = zip(rows, widths, strict=True)
        each = sum(len(members) * self._cost(width, width) for members, width in pairs)
        return each + len(rows) * self.each

    def _row_plan(
        self, lengths: Sequence[int], units: Sequence[Sequence[int]], budget: int
    ) -> list[list[int]]:
        """Data by micro-batch, where each has a row; those whose units are of one size go together."""
        found: list[list[int]] = []
        for size in sorted({len(unit) for unit in units}):
            own = [unit for unit in units if len(unit) == size]
            cells = [size * max(lengths[index] for index in unit) for unit in own]
            for batch in plan_batches(cells, budget, each=self.each):
                found.append([index for place in batch for index in own[place]])
        return found

    def _cost(self, cells: int, seen: int) -> float:
        """Of cells each of which sees half of so many."""
        return cells * (1 + seen / 2 / self.balance)

    def _rows(
        self, data: Sequence[Datum], owners: Sequence[Who], plan: list[list[int]]
    ) -> Iterator[Micro]:
        for indices in plan:
            yield self._micro(data, owners, _by_owner(indices, owners), width=None)

    def _joined(
        self, data: Sequence[Datum], owners: Sequence[Who], plan: list[list[int]]
    ) -> Iterator[Micro]:
        """One row each, in which the documents of an owner follow one another."""
        for indices in plan:
            width = sum(len(data[index]) for index in indices)
            yield self._micro(data, owners, _by_owner(indices, owners), width=width)

    def _packed(
        self,
        data: Sequence[Datum],
        owners: Sequence[Who],
        lengths: list[int],
        width: int,
        budget: int,
    ) -> Iterator[Micro]:
        rows = pack(lengths, width)
        each = max(budget // width, 1)
        for start in range(0, len(rows), each):
            chosen = sorted(index for row in rows[start : start + each] for index in row)
            yield self._micro(data, owners, chosen, width=width)

    def _micro(
        self, data: Sequence[Datum], owners: Sequence[Who], chosen: list[int], width: int | None
    ) -> Micro:
        members = [data[index] for index in chosen]
        batch = collate(members, pad_id=self.pad_id, packed=width is not None, row_tokens=width)
        prompt = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for document in batch.documents:
            prompt[
                document.row, document.start : document.start + members[document.index].prompt
            ] = True
        return Micro(
            batch=batch,
            members=tuple(chosen[document.index] for document in batch.documents),
            owners=tuple(owners[chosen[document.index]] for document in batch.documents),
            prompt=prompt,
            packed=width is not None,
            masked=not self.causal,
            apart=_documents(batch, width is not None)
            if self.apart and (width is not None or not self.causal)
            else None,
        )


def _by_owner(indices: Sequence[int], owners: Sequence[Who]) -> list[int]:
    """So that the data of each owner follow one another: their parts of a batch are slices then."""
    names = list(dict.fromkeys(owners[index] for index in indices))
    return sorted(indices, key=lambda index: names.index(owners[index]))


def check_fit(data: Sequence[Datum], units: Sequence[Sequence[int]], budget: int) -> None:
    """Raise `DataError` for data that must be seen together, and are more than a micro-batch may have."""
    for unit in units:
        longest = max((data[index] for index in unit), key=len)
        if len(unit) * len(longest) <= budget:
            continue
        what = f"{longest.origin or 'an example'} has {len(longest)} tokens"
        if len(unit) > 1:
            what += f" and must be seen together with {len(unit) - 1} more, {len(unit) * len(longest)} in all"
        raise DataError(
            f"{what}, more than a micro-batch may have ({budget}); raise micro_tokens, or shorten the example."
        )


def _documents(batch: Batch, packed: bool) -> Documents:
    """Those of a batch; the padding that ends a row is one more."""
    rows, width = batch.input_ids.shape
    ends = {document.row * width + document.stop for document in batch.documents}
    lengths = None if packed else tuple(document.stop for document in batch.documents)
    return Documents(tuple(sorted(ends | {width * (row + 1) for row in range(rows)})), lengths)


def layout_of(
    model: PreTrainedModel, *, causal: bool, pad_id: int, device: str | None = None
) -> Layout:
    """The layout that suits a model on a kind of device (its own, if none is said); call it on the bare base."""
    config = model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 512))
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    vocabulary = int(config.vocab_size)
    body = model if causal else model.base_model  # a classifier's output is of whole rows
    packs = causal and separates(model, vocabulary)
    idle = IDLE.get(device or model.device.type, IDLE["cuda"]) / (
        4 * width * (4 * width + 2 * inner)
    )
    return Layout(
        packs=packs,
        apart=(packs or not causal) and separates(body, vocabulary, told=True),
        causal=packs,
        balance=(2 * width + 1.5 * inner) / 4,
        each=max(int(idle), 1),
        pad_id=pad_id,
    )
