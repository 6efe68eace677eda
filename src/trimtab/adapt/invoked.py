"""Where an adapter acts that waits to be invoked: from the last occurrence of certain tokens in a row on.

Everything before it is what the bare base computes, to the last bit, so that a cache of keys and values may be shared.
In a generation the prompt decides: a row whose prompt has the tokens is invoked for good, and what is generated later
decides nothing. What is read further into the same cache (a next turn) may invoke it then.

Shapes: B rows of T tokens of the batch; U units (rows, or documents of a packed row); b rows of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import RouteError

if TYPE_CHECKING:
    from trimtab.adapt.at import At
    from trimtab.adapt.context import Context


def invoked(at: At, x: Tensor, tokens: Sequence[int], *, ids: bool = False) -> Tensor:
    """For each position of a part's x_..C (of its ids, for an embedding), whether the adapter acts there.

    Raises:
        RouteError: the model was called without token ids, or x is of other positions than they.
    """
    context = at.context
    key = (at.name, tuple(tokens))
    if key not in context.acting:
        context.acting[key] = _decided(context, at.name, tokens)
    mask_BT = context.acting[key].to(x.device)
    shape = x.shape if ids else x.shape[:-1]
    part = at.part
    if not part.flat and part.units is not None and len(part.units.unique()) < len(part.units):
        mask_BT = mask_BT.flatten()  # the site was given tokens, not rows
    chosen = part.take(mask_BT)
    if chosen.dim() == 2 and len(shape) == 2 and shape[1] < chosen.shape[1]:
        chosen = chosen[:, chosen.shape[1] - shape[1] :]  # the model goes on with the last ones
    elif chosen.dim() == 2 and len(shape) == 1 and shape[0] == chosen.shape[0]:
        chosen = chosen[:, -1]  # with the last one, or with what it made of the whole row
    if chosen.numel() != shape.numel():
        raise RouteError(
            f"adapter {at.name!r} acts from its invocation on, and {at.path} was given a tensor of shape "
            f"{tuple(x.shape)} for {tuple(mask_BT.shape)} tokens: it cannot be told where that is. Leave this module "
            "out of the targets."
        )
    return chosen.reshape(shape)


def _decided(context: Context, name: str, tokens: Sequence[int]) -> Tensor:
    """(B, T) true where the adapter acts."""
    ids = context.ids
    if ids is None:
        raise RouteError(
            f"adapter {name!r} acts from its invocation tokens on, and the model was called without token ids; pass "
            "input_ids."
        )
    wanted = torch.tensor(list(tokens), device=ids.device)
    if context.route.spans is not None:
        acting = torch.zeros_like(ids, dtype=torch.bool)
        for span in context.route.spans:
            document = ids[span.row : span.row + 1, span.start : span.stop]
            acting[span.row, span.start : span.stop] = _from_last(document, wanted)[0]
        return acting
    key = (name, "invoked", context.share)
    before = context.memory.get(key)
    if before is None:
        acting = _from_last(ids, wanted)
    else:
        if len(before) != len(ids):  # decided before rows became beams
            before = before.repeat_interleave(len(ids) // len(before))
        acting = before[:, None].expand(ids.shape)
        if ids.shape[1] > 1:
            acting = acting | _from_last(ids, wanted)
    context.memory[key] = acting.any(1)
    return acting


def _from_last(ids_BT: Tensor, tokens: Tensor) -> Tensor:
    """True from the last occurrence of the tokens in each row on."""
    hits = torch.zeros_like(ids_BT, dtype=torch.bool)
    count = len(tokens)
    if ids_BT.shape[1] >= count:
        found = (ids_BT.unfold(1, count, 1) == tokens).all(-1)
        hits[:, : found.shape[1]] = found
    so_far = hits.cumsum(1)
    return (so_far == so_far[:, -1:]) & (so_far > 0)
