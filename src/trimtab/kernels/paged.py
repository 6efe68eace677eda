"""Attention of one new token a row to keys and values that lie in pages.

    out_r = Σ_e w_e · out_e / Σ_e w_e,   w_e = exp(lse_e − max lse),   over the entries e of row r

An entry is a page that a row reads. Each page is attended to by itself, where it lies, with the logarithm of its sum
of exponentials; the parts of a row are then weighed by these. So keys are neither copied nor padded to the longest
row. A page that several rows read (a shared prefix) is copied for all of them but one.

Legend: B rows, H query heads, G key heads, R = H / G, D head width, P pages, S positions of a page, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE = 0.5
"""From this share of used pages on, all pages up to the last used one are attended to where they lie."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Which row reads which page. The first ``extent`` entries are that many pages where they lie, and the others read
    copies of ``pages``. ``bias`` is −inf where a position is not a row's.

    ``rows`` say whose an entry is; one more than there are rows is nobody's, which is whatever row's in ``asking``.
    """

    rows: Tensor
    asking: Tensor
    pages: Tensor
    bias: Tensor
    extent: int

    @classmethod
    def of(
        cls, tables: Sequence[Sequence[int]], lengths: Sequence[int], size: int,
        like: Tensor, windows: int | None = None,
    ) -> Entries:  # fmt: skip
        """``tables[r]`` are the pages of row r in order, which hold ``lengths[r]`` positions; of these the last
        ``windows`` are seen."""
        rows, pages, firsts, lasts = [], [], [], []
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            begin = 0 if windows is None else max(length - windows, 0)
            for number in range(begin // size, -(-length // size)):
                rows.append(row)
                pages.append(table[number])
                firsts.append(max(begin - number * size, 0))
                lasts.append(min(length - number * size, size))
        extent = max(pages) + 1
        seen = set(pages)
        if len(seen) < DENSE * extent:
            extent = 0
        bias = _bias(firsts, lasts, size, like)
        given = torch.tensor(rows), torch.tensor(pages), bias
        found = _in_place(rows, len(tables), pages, bias, extent) if extent else given
        rows_E, pages_E, bias_E = (tensor.to(like.device) for tensor in found)
        return cls(rows_E, rows_E.clamp(max=len(tables) - 1), pages_E, bias_E, extent)


def _bias(firsts: list[int], lasts: list[int], size: int, like: Tensor) -> Tensor:
    """(E, 1, 1, S)."""
    places = torch.arange(size)
    first_E, last_E = torch.tensor(firsts)[:, None], torch.tensor(lasts)[:, None]
    hidden = (places < first_E) | (places >= last_E)
    bias = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill(hidden, float("-inf"))
    return bias[:, None, None]


def _in_place(
    rows: list[int], nobody: int, pages: list[int], bias: Tensor, extent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first reader of each page at the page's own place, nobody at free pages; then the other readers."""
    first: dict[int, int] = {}
    others = []
    for entry, page in enumerate(pages):
        if page in first:
            others.append(entry)
        else:
            first[page] = entry
    own = torch.tensor([first.get(page, -1) for page in range(extent)])
    order = torch.cat([own, torch.tensor(others, dtype=torch.long)])
    rows_E = torch.where(order < 0, nobody, torch.tensor(rows)[order])
    beside = torch.tensor(pages)[order[extent:]]
    return rows_E, beside, bias[order]  # entry −1 takes the last one's bias, and goes to nobody


def paged_attention(
    q_BHD: Tensor, keys_PGSD: Tensor, values_PGSD: Tensor, entries: Entries, scale: float
) -> Tensor:
    """(B, H, D): what each row's token finds in the row's pages."""
    groups = keys_PGSD.shape[1]
    q_BGRD = q_BHD.unflatten(1, (groups, -1))
    extent, q_EGRD = entries.extent, q_BGRD[entries.asking]
    found = []
    if extent:
        own, bias = q_EGRD[:extent], entries.bias[:extent]
        found.append(_attend(own, keys_PGSD[:extent], values_PGSD[:extent], bias, scale))
    if len(entries.pages):
        own, bias = q_EGRD[extent:], entries.bias[extent:]
        keys, values = (t.index_select(0, entries.pages) for t in (keys_PGSD, values_PGSD))
        found.append(_attend(own, keys, values, bias, scale))
    out_EGRD, lse_EGR = (torch.cat(t) if len(found) > 1 else t[0] for t in zip(*found, strict=True))
    return _merged(out_EGRD, lse_EGR, entries.rows, len(q_BHD)).flatten(1, 2).to(q_BHD.dtype)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(E, G, R, D) and (E, G, R) in fp32 at least."""
    if q.device.type == "cpu" and keys.shape[-1] == values.shape[-1]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, attn_mask=bias, scale=scale
        )
        return out, lse
    scores = (q @ keys.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale + bias
    return scores.softmax(-1).to(q.dtype) @ values, scores.logsumexp(-1)


def _merged(out_EGRD: Tensor, lse_EGR: Tensor, rows_E: Tensor, count: int) -> Tensor:
    """(B, G, R, D): the entries of each row, weighed. Those of nobody are those of one more row, whatever they hold."""
    wide = torch.promote_types(out_EGRD.dtype, torch.float32)
    lse, into_EGR = lse_EGR.to(wide), rows_E[:, None, None].expand_as(lse_EGR)
    most = lse.new_full((count + 1, *lse.shape[1:]), float("-inf"))
    most = most.scatter_reduce(0, into_EGR, lse, "amax")
    weights = (lse - most[rows_E]).exp()[..., None]
    summed = out_EGRD.new_zeros(*most.shape, out_EGRD.shape[-1] + 1, dtype=wide)
    summed.index_add_(0, rows_E, torch.cat([out_EGRD * weights, weights], -1))
    return summed[:count, ..., :-1] / summed[:count, ..., -1:]


def reference(
    q_BHD: Tensor, keys_PGSD: Tensor, values_PGSD: Tensor,
    tables: Sequence[Sequence[int]], lengths: Sequence[int], scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    """The same, row by row."""
    rows = []
    for q_HD, table, length in zip(q_BHD, tables, lengths, strict=True):
        begin = 0 if window is None else max(length - window, 0)
        keys, values = (
            t[list(table)].transpose(0, 1).flatten(1, 2)[:, begin:length]
            for t in (keys_PGSD, values_PGSD)
        )
        rows.append(
            F.scaled_dot_product_attention(
                q_HD[None, :, None], keys[None], values[None], scale=scale, enable_gqa=True
            )[0, :, 0]
        )
    return torch.stack(rows)
