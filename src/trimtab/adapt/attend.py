"""The attention functions: how what a forward puts inside attention gets there.

    softmax([q P_Kᵀ ; q Kᵀ]) [P_V ; V]   +   gate · softmax(q A_Kᵀ) A_V

They are registered with transformers, put keys and values before the model's own and widen the mask, and add the output
of the gated attentions beside. So caches, checkpoints, grouped queries, padding and generation are the model's own. Of
packed documents and pages they are told by keyword (`trimtab.adapt.documents`).

Shapes: B rows, T queries, S keys, P virtual tokens, H heads, G key heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from trimtab.adapt.documents import DOCUMENTS, PAGES, Documents, told
from trimtab.adapt.injected import KEYWORD, Beside, Injected
from trimtab.adapt.stretches import Stretch
from trimtab.errors import UnsupportedError
from trimtab.kernels import varlen
from trimtab.kernels.attention import blocked_attention

if TYPE_CHECKING:
    from trimtab.adapt.pages import Pages

LEAD = "trimtab_lead"
"""Where attention is told how many keys stand before the text."""
OURS = {"sdpa": "trimtab_sdpa", "eager": "trimtab_eager"}
"""Attention functions of transformers -> ours around them."""


def _attend(inner: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
            mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    injected: Injected | None = kwargs.pop(KEYWORD, None)
    if PAGES in kwargs:
        return _paged(kwargs.pop(PAGES), module, query, key, value, mask, injected, kwargs), None
    if injected is None:
        return inner(module, query, key, value, mask, *args, **kwargs)
    caught = injected.context.caught
    if caught is not None:
        caught[injected.path] = key, value
    apart = inner is _by_documents and _divides(injected, module, query, key, mask, args, kwargs)
    if apart and (found := injected.stretches(query.shape[0], query.shape[2])):
        return _owner_by_owner(injected, found, module, query, key, value, kwargs), None
    beside = [_beside(injected, entry, query, kwargs.get("scaling")) for entry in injected.beside]
    if (
        injected.before
        and inner is _by_documents
        and _leads(injected, module, query, key, mask, args, kwargs)
    ):
        key, value, count = _led(injected, key, value)
        kwargs[LEAD] = count
    elif injected.before:
        rows, _, length, _ = query.shape
        mask, key, value = _own_mask(module, mask, query, key, value, kwargs)
        visible = injected.visible(rows, length, query.device, kwargs.get("sliding_window"))
        if mask.dtype != torch.bool:
            least = torch.finfo(mask.dtype).min
            visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, least)
        visible = visible.expand(rows, 1, length, -1)
        mask = torch.cat([visible, mask.expand(rows, 1, length, mask.shape[-1])], dim=-1)
        key, value, _ = _led(injected, key, value)
        bias = kwargs.get("position_bias")
        if bias is not None:
            kwargs["position_bias"] = injected.widened(bias)
    out = inner(module, query, key, value, mask, *args, **kwargs)
    return (sum(beside, out[0]), *out[1:]) if beside else out


def _paged(pages: Pages, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
           injected: Injected | None, kwargs: dict[str, Any]) -> Tensor:  # fmt: skip
    """Attention to what lies in pages, and the gated attentions beside it."""
    window, scale = kwargs.get("sliding_window"), kwargs.get("scaling")
    more = [name for name in _OTHERS if kwargs.get(name) is not None]
    if more or (mask is not None and window is None):
        raise UnsupportedError(
            f"{type(module).__name__} wants {', '.join(more) or 'a mask'}, which pages of keys and values do not know."
        )
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    gated: list[Tensor] = []
    if injected is not None:
        gated = [_beside(injected, entry, query, scale) for entry in injected.beside]
    return sum(gated, pages.attend(module, query, key, value, injected, scale, window))


def _led(injected: Injected, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values with the virtual tokens before them, and how many these are."""
    tokens = injected.tokens(lambda entry: entry.keys, key)
    values = injected.tokens(lambda entry: entry.values, value)
    return torch.cat([tokens, key], 2), torch.cat([values, value], 2), tokens.shape[2]


def _divides(injected: Injected, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None,
             args: Any, kwargs: dict[str, Any]) -> bool:  # fmt: skip
    """Whether owners differ, and ours may do the attention of a text to itself for each of them."""
    route = injected.context.route
    causal, dropout = _is_causal(module, kwargs), float(kwargs.get("dropout") or 0.0)
    return (
        mask is None
        and route.single is None
        and (route.spans is None or kwargs.get(DOCUMENTS) is not None)
        and kwargs.get("sliding_window") is None
        and _plain(query, key, args, kwargs)
        and _fits(query, documents=True, causal=causal, dropout=dropout)
    )


def _owner_by_owner(injected: Injected, found: Sequence[Stretch], module: nn.Module, query: Tensor,
                    key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:  # fmt: skip
    """(B, T, H, D): attention of each stretch of rows, or of tokens, by itself."""
    packed = injected.context.route.spans is not None
    documents: Documents | None = kwargs.pop(DOCUMENTS, None)
    each = 1 if packed else query.shape[2]
    sizes = [stretch.length for stretch in found]
    split = (tensor.split(sizes, 2 if packed else 0) for tensor in (query, key, value))
    outs = []
    for stretch, q, k, v in zip(found, *split, strict=True):
        own = injected.of(stretch)
        more: dict[str, Any] = {}
        if documents is not None:
            rows = slice(None) if packed else slice(stretch.start, stretch.stop)
            more[DOCUMENTS] = documents.within(stretch.start * each, stretch.stop * each, rows)
        if own.before:
            k, v, more[LEAD] = _led(own, k, v)
        out: Tensor = _by_documents(module, q, k, v, None, **kwargs, **more)[0]
        outs.append(sum((_gated(e, q, kwargs.get("scaling")) for e in own.beside), out))
    return torch.cat(outs, 1 if packed else 0)


def _leads(injected: Injected, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None,
           args: Any, kwargs: dict[str, Any]) -> bool:  # fmt: skip
    """Whether every position of a text that attends to itself sees all virtual tokens, and ours may do it."""
    owner = injected.context.route.single
    causal, dropout = _is_causal(module, kwargs), float(kwargs.get("dropout") or 0.0)
    return (
        mask is None
        and owner is not None
        and kwargs.get("sliding_window") is None
        and all(entry.owner == owner and entry.keys.dim() == 2 for entry in injected.before)
        and _plain(query, key, args, kwargs)
        and _fits(query, documents=True, causal=causal, dropout=dropout)
    )


def _beside(injected: Injected, entry: Beside, query: Tensor, scaling: float | None) -> Tensor:
    """(B, T, H, D): the gated attention over these tokens alone, zero where their owner does not act."""
    rows, _, length, _ = query.shape
    mine = injected.owned(entry.owner, rows, length, query.device)
    return _gated(entry, query, scaling).masked_fill(~mine.transpose(1, 2), 0)


def _gated(entry: Beside, query: Tensor, scaling: float | None) -> Tensor:
    """(B, T, H, D): the gated attention over these tokens alone."""
    _, heads, _, width = query.shape

    def as_heads(tokens_PC: Tensor) -> Tensor:
        tokens = tokens_PC.to(query.dtype).unflatten(-1, (-1, width)).transpose(0, 1)
        return tokens.repeat_interleave(heads // tokens.shape[0], dim=0)

    scores = query @ as_heads(entry.keys).mT * (width**-0.5 if scaling is None else scaling)
    shares = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    gated = entry.gate.view(-1, 1, 1) * (shares.to(query.dtype) @ as_heads(entry.values))
    return gated.transpose(1, 2)


def _own_mask(module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
              kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The mask over the model's own keys; where the model left it out, the one it meant."""
    if mask is not None:
        return mask, key, value
    length, keys = query.shape[2], key.shape[2]
    documents: Documents | None = kwargs.get(DOCUMENTS)
    causal = _is_causal(module, kwargs)
    if documents is not None:
        seen = documents.mask(query.shape[0], length, query.device, causal)
        return seen, key, value
    full = torch.ones(length, keys, dtype=torch.bool, device=query.device)
    if not causal or length == 1:
        return full[None, None], key, value
    if keys > length:  # the first fill of a static cache: the rest of it is still empty
        key, value, full = key[:, :, :length], value[:, :, :length], full[:, :length]
    return full.tril()[None, None], key, value


_OTHERS = (
    "position_bias", "softcap", "cache", "s_aux", "sinks", "indices", "block_indices", "head_mask", "cu_seq_lens_q",
)  # fmt: skip
"""What models of transformers give their attention beside q, k, v and a mask that changes what it computes."""


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(module.__dict__.get("is_causal", True) if causal is None else causal)


def _by_documents(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                  *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """Scaled dot products: for documents by ours or, on CUDA, by torch's kernel that is told of them; and on a CPU by
    ours where it is the faster one."""
    documents: Documents | None = kwargs.pop(DOCUMENTS, None)
    lead: int = kwargs.pop(LEAD, 0)
    causal = _is_causal(module, kwargs)
    if mask is None and (lead or _plain(query, key, args, kwargs)):
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        dropout = float(kwargs.get("dropout") or 0.0)
        told = documents is not None and documents.longest > 1 and causal and not dropout
        if documents is not None and told and not lead and varlen.takes(query, key, value):
            starts = documents.starts(query.device)
            given = query, key, value, scale, starts, documents.longest
            return varlen.documents_attention(*given), None
        ours = documents is not None or bool(lead)
        if _fits(query, documents=ours, causal=causal, dropout=dropout):
            lengths = None if documents is None else documents.lengths
            ends = None if documents is None or lengths is not None else documents.ends
            out = blocked_attention(
                query, key, value, scale, ends,
                lengths=lengths, lead=lead, causal=causal, dropout=dropout,
            )  # fmt: skip
            return out, None
    if mask is None and documents is not None:
        mask = documents.mask(query.shape[0], query.shape[2], query.device, causal)
    return AttentionInterface()["sdpa"](module, query, key, value, mask, *args, **kwargs)


def _fits(query: Tensor, *, documents: bool, causal: bool, dropout: float) -> bool:
    """Whether attention is to be ours. Torch has no fused one with dropout on a CPU, and a slow causal one in bf16."""
    slow = dropout > 0 or (causal and query.dtype == torch.bfloat16)
    return query.device.type in ("cpu", "meta") and (documents or slow)


def _plain(query: Tensor, key: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether attention of a text to itself, and nothing beside it, is asked for."""
    return (
        1 < query.shape[2] == key.shape[2]
        and not (args or torch.compiler.is_compiling())
        and all(kwargs.get(name) is None for name in _OTHERS)
    )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As torch's; none where `apart` says so, and no window is shorter than a document."""
    documents, window = told(), kwargs.get("local_size")
    if documents is not None and (window is None or window >= documents.longest):
        return None
    return sdpa_mask(*args, **kwargs)


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _attend(_by_documents, module, *args, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    own = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return _attend(own, module, *args, **kwargs)


AttentionInterface.register("trimtab_sdpa", _sdpa)
AttentionInterface.register("trimtab_eager", _eager)
AttentionMaskInterface.register("trimtab_sdpa", _mask)
AttentionMaskInterface.register("trimtab_eager", eager_mask)
