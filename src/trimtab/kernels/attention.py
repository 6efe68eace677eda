"""Attention within documents, in blocks of queries, by matrix products, on a CPU.

    P = softmax(s · Q Kᵀ + M),   O = (P ∘ D) V
    dV = (P ∘ D)ᵀ dO,   dP = D ∘ (dO Vᵀ),   dS = P ∘ (dP − rowsum(P ∘ dP)),   dQ = s · dS K,   dK = s · dSᵀ Q

A block of queries meets the keys of its document, where attention is causal those up to its own end, so that about half
of a long document's products are never made; the query heads that share a key head are rows of one product. Keys that
lead (a prefix) are seen by every query. D is dropout, of which a seed is kept (`trimtab.kernels.dropout`). For backward
q, k, v, the output and a number for each row of scores are kept. How fast that is beside torch's own:
benchmarks/attention.py.

Products of bf16 are rounded to bf16, which would cost large scores all their precision. So both products are rounded
as differences from a number of their row: s · Q Kᵀ from its largest, found by a first product, and dP from rowsum(P ∘
dP) = rowsum(dO ∘ O). Softmax and its backward do not change with such a number, whatever it is. Where products in fp32
are the faster ones (`trimtab.kernels.products`), and with dropout, blocks are fp32 inside, and need no first product.

Legend: B rows, H query heads, G key heads, R = H / G, T tokens, P keys that lead, D head width, N queries of a block, S
keys it meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels import products
from trimtab.kernels.dropout import Masks, drawn_seed

QUERIES = 96
SCORES = 2**23
"""How many queries, and how many bytes of scores, a block may have (one key head's, at least)."""


def blocked_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    scale: float,
    ends: Sequence[int] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    lead: int = 0,
    causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """(B, T, H, D): the output of attention; each token sees those of its document, if ``causal`` up to itself.

    ``ends`` are the places where the documents of the flattened (B · T) tokens end, none of them across a row; without
    them a row is a document, of which the first tokens may be seen, where ``lengths`` says how many. ``dropout`` is
    that of the shares that a token has in another. ``lead`` says how many more keys and values than tokens
    there are; they come first, and all tokens see them.
    """
    seed = drawn_seed() if dropout else 0
    if lengths is not None and min(lengths) == q_BHTD.shape[2]:
        lengths = None
    given = _How(scale, ends, lengths, lead, causal, dropout, seed)
    found: Tensor = _Attention.apply(q_BHTD, k_BGTD, v_BGTD, given)  # type: ignore[no-untyped-call]
    return found


class _How(NamedTuple):
    scale: float
    ends: Sequence[int] | None
    lengths: Sequence[int] | None
    lead: int
    causal: bool
    dropout: float
    seed: int

    def masks(self) -> Masks | None:
        return Masks(self.dropout, self.seed) if self.dropout else None

    def inner(self, q: Tensor) -> torch.dtype:
        wide = torch.promote_types(q.dtype, torch.float32)
        return wide if self.dropout or products.widens(q) else q.dtype


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: _How) -> Tensor:
        rows, heads, tokens, _ = q.shape
        out = torch.empty(rows, tokens, heads, v.shape[-1], dtype=q.dtype, device=q.device)
        out_BGRTD, q_BGRTD = (_grouped(t, k.shape[1]) for t in (out.transpose(1, 2), q))
        most_BGRT = q.new_zeros(q_BGRTD.shape[:-1])
        inner, masks = how.inner(q), how.masks()
        rounds = inner not in (torch.float32, torch.float64)
        blocks = list(_blocks(q_BGRTD, how, inner))
        room = _room(q_BGRTD, blocks, how.lead, 2, inner)
        for block in blocks:
            queries, keys = (
                _flat(q_BGRTD[block.queries]).to(inner),
                _near(k, block, how.lead).to(inner),
            )
            scores = _scores(room[0], queries, keys, how, block)
            if rounds:
                most = scores.amax(-1, keepdim=True)
                most_BGRT[block.queries] = most.view(*most_BGRT[block.queries].shape)
                scores = _scores(room[0], queries, keys, how, block, most)
            shares = torch.softmax(scores, -1, out=_shaped(room[1], scores))
            if masks is not None:
                shares.mul_(masks.next_like(shares)).mul_(1 / (1 - how.dropout))
            made = torch.bmm(shares, _near(v, block, how.lead).to(inner))
            out_BGRTD[block.queries] = made.view(*out_BGRTD[block.queries].shape)
        ctx.save_for_backward(q, k, v, out, most_BGRT)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, most_BGRT = ctx.saved_tensors
        q_BGRTD, grad_BGRTD = (_grouped(t, k.shape[1]) for t in (q, outer[0].transpose(1, 2)))
        how: _How = ctx.how
        inner, masks = how.inner(q), how.masks()
        rounds = inner not in (torch.float32, torch.float64)
        wide = torch.promote_types(q.dtype, torch.float32)
        shares_BTH = (outer[0].to(inner) * out).sum(-1) if rounds else None
        mean_BGRT = None if shares_BTH is None else _grouped(shares_BTH.mT, k.shape[1])
        dq_BGRTD = torch.empty_like(q_BGRTD)
        dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
        blocks = list(_blocks(q_BGRTD, how, inner))
        room = _room(q_BGRTD, blocks, how.lead, 3, inner)
        for block in blocks:
            queries, grads = (_flat(t[block.queries]).to(inner) for t in (q_BGRTD, grad_BGRTD))
            keys = _near(k, block, how.lead).to(inner)
            mean = None if mean_BGRT is None else _column(mean_BGRT[block.queries])
            most = _column(most_BGRT[block.queries]) if rounds else None
            scores = _scores(room[0], queries, keys, how, block, most)
            shares = torch.softmax(scores, -1, out=_shaped(room[1], scores))
            if masks is None:
                _add(dv, block, how.lead, torch.bmm(shares.mT, grads))
                slopes = _product(room[0], grads, _near(v, block, how.lead).to(inner), 1.0, mean)
            else:
                mask = masks.next_like(shares).mul_(1 / (1 - how.dropout))
                given = torch.mul(shares, mask, out=_shaped(room[2], shares))
                _add(dv, block, how.lead, torch.bmm(given.mT, grads))
                slopes = _product(
                    room[0], grads, _near(v, block, how.lead).to(inner), 1.0, None
                ).mul_(mask)
            slopes = torch.ops.aten._softmax_backward_data.out(
                slopes, shares, -1, shares.dtype, grad_input=_shaped(room[2], shares)
            )
            made = torch.bmm(slopes, keys).mul_(how.scale)
            dq_BGRTD[block.queries] = made.view(*dq_BGRTD[block.queries].shape)
            _add(dk, block, how.lead, torch.bmm(slopes.mT, queries))
        return dq_BGRTD.flatten(1, 2), dk.mul_(how.scale).to(k.dtype), dv.to(v.dtype), None


class _Block(NamedTuple):
    """Queries from ``start`` to ``stop``, which meet keys from ``first`` to ``last``, for some rows and key heads."""

    rows: slice
    heads: slice
    first: int
    last: int
    start: int
    stop: int

    @property
    def queries(self) -> tuple[slice, ...]:
        return self.rows, self.heads, slice(None), slice(self.start, self.stop)

    def keys(self, lead: int) -> list[tuple[slice, ...]]:
        """Where they are, among those that lead and those of tokens."""
        last = lead + self.last
        apart = bool(self.first and lead)
        places = [slice(0, lead)] if apart else []
        places.append(slice(lead + self.first if apart else self.first, last))
        return [(self.rows, self.heads, place) for place in places]


def _blocks(q_BGRTD: Tensor, how: _How, inner: torch.dtype) -> Iterator[_Block]:
    rows, groups, heads, tokens, _ = q_BGRTD.shape
    most = SCORES // inner.itemsize
    for some, first, end in _documents(rows, tokens, how.ends):
        for start in range(first, end, QUERIES):
            stop = min(start + QUERIES, end)
            last = stop if how.causal else end
            each = max(most // (heads * (stop - start) * (how.lead + last - first)), 1)
            for row in range(some.start, some.stop, max(each // groups, 1)):
                beside = slice(row, min(row + max(each // groups, 1), some.stop))
                for head in range(0, groups, each):
                    yield _Block(
                        beside, slice(head, min(head + each, groups)), first, last, start, stop
                    )


def _documents(
    rows: int, tokens: int, ends: Sequence[int] | None
) -> Iterator[tuple[slice, int, int]]:
    """Rows, and where in them a document begins and ends."""
    if ends is None:
        yield slice(0, rows), 0, tokens
        return
    start = 0
    for end in ends:
        row = start // tokens
        yield slice(row, row + 1), start - row * tokens, end - row * tokens
        start = end


def _grouped(x_BHTD: Tensor, groups: int) -> Tensor:
    """(B, G, R, T, D): the query heads by their key head."""
    return x_BHTD.unflatten(1, (groups, -1))


def _flat(x_BGRND: Tensor) -> Tensor:
    """(B · G, R · N, D)."""
    return x_BGRND.flatten(2, 3).flatten(0, 1)


def _near(x_BGTD: Tensor, block: _Block, lead: int) -> Tensor:
    """(B · G, S, D): what a block meets."""
    found = [x_BGTD[place] for place in block.keys(lead)]
    return (found[0] if len(found) == 1 else torch.cat(found, dim=2)).flatten(0, 1)


def _add(sum_BGTD: Tensor, block: _Block, lead: int, part: Tensor) -> None:
    places = [sum_BGTD[place] for place in block.keys(lead)]
    shaped = part.view(*places[0].shape[:2], *part.shape[1:])
    for there, own in zip(places, shaped.split([p.shape[2] for p in places], dim=2), strict=True):
        there += own


def _column(x_BGRN: Tensor) -> Tensor:
    """(B · G, R · N, 1)."""
    return x_BGRN.flatten(2, 3).flatten(0, 1).unsqueeze(-1)


def _room(
    q_BGRTD: Tensor, blocks: Sequence[_Block], lead: int, count: int, inner: torch.dtype
) -> Tensor:
    """Memory for the scores of any block, so many times: blocks take turns in it."""
    heads = q_BGRTD.shape[2]
    sizes = (
        (b.rows.stop - b.rows.start)
        * (b.heads.stop - b.heads.start)
        * heads
        * (b.stop - b.start)
        * (lead + b.last - b.first)
        for b in blocks
    )
    return torch.empty(count, max(sizes), dtype=inner, device=q_BGRTD.device)


def _shaped(room: Tensor, like: Tensor) -> Tensor:
    return room[: like.numel()].view(like.shape)


def _scores(
    room: Tensor, q: Tensor, k: Tensor, how: _How, block: _Block, less: Tensor | None = None
) -> Tensor:
    """(B · G, R · N, S): −inf where a key may not be seen, because it comes later."""
    scores = _product(room, q, k, how.scale, less)
    if how.lengths is not None:
        seen = torch.tensor(how.lengths[block.rows], device=q.device)
        places = torch.arange(block.first, block.last, device=q.device)
        unseen_BS = places >= seen[:, None]
        by_row = scores.unflatten(0, (len(seen), -1))
        by_row[..., how.lead :].masked_fill_(unseen_BS[:, None, None], float("-inf"))
    if not how.causal:
        return scores
    count = block.stop - block.start
    later = torch.full((count, count), float("-inf"), dtype=scores.dtype, device=q.device).triu(1)
    scores.unflatten(1, (-1, count))[..., -count:].add_(later)
    return scores


def _product(room: Tensor, one: Tensor, other: Tensor, scale: float, less: Tensor | None) -> Tensor:
    """scale · one otherᵀ − less, rounded once."""
    out = room[: len(one) * one.shape[1] * other.shape[1]].view(*one.shape[:2], other.shape[1])
    if less is None:
        return torch.baddbmm(out, one, other.mT, beta=0, alpha=scale, out=out)
    torch.neg(less.expand_as(out), out=out)
    return out.baddbmm_(one, other.mT, alpha=scale)
