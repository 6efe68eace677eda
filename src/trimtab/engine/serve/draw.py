"""The next token of each row, by the row's own parameters and from its own random numbers.

    p = softmax(z / t) among the k most likely, the fewest that make up top_p, and those with p ≥ min_p · max p

Each row takes one number u of its own generator and the first token at which the sum of probabilities passes u. So what
a row draws depends neither on the rows beside it nor on any generator of the process.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.engine.guide import Guide, masked
from trimtab.engine.sampling import SamplingParams

COLDEST = 1e-30
"""Below it a temperature is like this one; fp32 would take it for zero."""


class Row(NamedTuple):
    """What one row is drawn by; ``seen`` are the tokens of its text so far, ``guide`` says which may come next."""

    params: SamplingParams
    generator: torch.Generator
    seen: Sequence[int]
    guide: Guide | None = None


def draw(logits_BV: Tensor, rows: Sequence[Row]) -> list[int]:
    """A token for each row."""
    logits = _allowed(logits_BV.float(), [row.guide for row in rows])
    for number, row in enumerate(rows):
        if row.params.repetition_penalty != 1.0:
            logits = logits.clone() if logits is logits_BV else logits
            _penalise(logits[number], row)
    found = logits.argmax(-1)
    for cut in (False, True):
        drawn = [
            n for n, r in enumerate(rows) if r.params.temperature > 0 and _cuts(r.params) == cut
        ]
        if drawn:
            chosen = _drawn(logits[drawn], [rows[number] for number in drawn], cut=cut)
            found[torch.tensor(drawn, device=found.device)] = chosen
    tokens: list[int] = found.tolist()
    return tokens


def log_probabilities(logits_BV: Tensor) -> Tensor:
    """(B, V): of the model's own distribution, whatever the parameters of the draw."""
    return logits_BV.float().log_softmax(-1)


def _allowed(logits_BV: Tensor, guides: Sequence[Guide | None]) -> Tensor:
    """−∞ for what must not come; the logits that were given where no row has a guide."""
    own = [(number, guide) for number, guide in enumerate(guides) if guide is not None]
    if not own:
        return logits_BV
    places = torch.tensor([number for number, _ in own], device=logits_BV.device)
    return logits_BV.index_copy(0, places, masked(logits_BV[places], [guide for _, guide in own]))


def _penalise(logits_V: Tensor, row: Row) -> None:
    """Divide what speaks for tokens that were seen, multiply what speaks against them (CTRL, arXiv:1909.05858)."""
    seen = torch.tensor(sorted(set(row.seen)), device=logits_V.device)
    own, penalty = logits_V[seen], row.params.repetition_penalty
    most = torch.finfo(own.dtype).max  # which a small penalty would pass
    logits_V[seen] = torch.where(own < 0, own * penalty, own / penalty).clamp(max=most)


def _cuts(params: SamplingParams) -> bool:
    """Whether not all of the vocabulary may be drawn."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _drawn(logits_BV: Tensor, rows: Sequence[Row], *, cut: bool) -> Tensor:
    cuts = [row.params for row in rows]

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), device=logits_BV.device)[:, None]

    # the likeliest is at zero, so that no temperature makes it infinite
    likely_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    scaled = likely_BV / column(max(p.temperature, COLDEST) for p in cuts)
    uniform = torch.tensor(
        [float(torch.rand((), generator=row.generator, dtype=torch.float64)) for row in rows],
        dtype=torch.float64, device=logits_BV.device,
    )[:, None]  # fmt: skip
    if not cut:
        return _passed(scaled.softmax(-1), uniform)
    shares, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    places = torch.arange(shares.shape[1], device=shares.device)
    top_k = column(p.top_k for p in cuts)
    out = (top_k > 0) & (places >= top_k)
    kept = shares.masked_fill(out, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    before = kept.double().cumsum(-1) - kept
    out |= before >= column(p.top_p for p in cuts)
    out |= kept < column(p.min_p for p in cuts) * kept[:, :1]
    out[:, 0] = False
    place = _passed(kept.masked_fill(out, 0.0), uniform)
    return order.gather(1, place[:, None])[:, 0]


def _passed(shares_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """(B,) the first place at which the sum passes that part of the whole."""
    sums = shares_BV.double().cumsum(-1)
    places = torch.searchsorted(sums, uniform_B1 * sums[:, -1:], right=True)[:, 0]
    last = (shares_BV > 0).long().mul(torch.arange(1, shares_BV.shape[1] + 1, device=sums.device))
    return torch.minimum(places, last.amax(-1) - 1)
