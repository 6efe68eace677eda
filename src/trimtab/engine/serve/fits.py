"""Whether keys and values of a model, and an adapter's, can lie in pages.

A model is asked, not its name: the same text is read at once without pages, and with them in pieces, beside another
text and token by token. What does not come out the same is answered in batches instead (`trimtab.engine.sampling`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.adapt import attention
from trimtab.adapt.adapter import SiteSpec
from trimtab.adapt.attend import OURS
from trimtab.adapt.contract import Method
from trimtab.adapt.documents import PAGES, apart
from trimtab.adapt.front import decoding
from trimtab.adapt.pages import SIZE, Pages, Store, Unit
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import UnsupportedError

LENGTH, PIECE, OTHER = 14, 9, 5
APART, APART_IN_16_BITS = 1e-3, 0.2
"""How far logits may be apart (in the mean, of their own spread): rounding is far below, another text far above."""
MOVING = {"dynamic", "longrope"}
"""Rotary embeddings that depend on the longest text of a batch."""


@torch.no_grad()
def model_fits(model: PreTrainedModel) -> bool:
    """Ask the bare base, in eval mode."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(rope.get("rope_type")), str(getattr(config, "rope_type", ""))}
    if (
        model.device.type == "meta"
        or model.config._attn_implementation not in ("sdpa", OURS["sdpa"])
        or not model._can_set_attn_implementation()
        or getattr(config, "attention_chunk_size", None)
        or kinds & MOVING
        or "logits_to_keep" not in inspect.signature(model.forward).parameters
    ):
        return False
    try:
        with attention.Ours(model):
            plain, paged = _plain(model), _paged(model)
    except (TypeError, UnsupportedError, RuntimeError, KeyError, IndexError):
        return False  # it hands no further word on, or wants something of its own
    plain, paged = (t - t.mean(1, keepdim=True) for t in (plain, paged))
    far = float(((plain - paged).std(1) / plain.std(1)).max())
    return far <= (APART_IN_16_BITS if model.dtype.itemsize == 2 else APART)


def adapter_fits(
    model: PreTrainedModel, methods: Sequence[Method], sites: Sequence[SiteSpec], *, windows: bool
) -> bool:
    """Whether what an adapter of these methods, at these sites, puts before a text stands in all attentions alike;
    ``windows``: some see no more than so many tokens, and virtual ones are none of them."""
    keys = sum(method.virtual_tokens for method in methods)
    prompt = sum(method.prompt_tokens for method in methods)
    if not (keys or prompt):
        return True
    anatomy = anatomy_of(model)
    if (keys and windows) or (prompt and not decoding(model, anatomy)):
        return False
    acting = dict.fromkeys(anatomy.role("self_attention"), 0)
    for site in sites:
        if tokens := methods[site.method].at(site.path).virtual_tokens:
            acting[site.path] = acting.get(site.path, 0) + tokens
    return set(acting.values()) == {keys}


def has_windows(model: PreTrainedModel) -> bool:
    """Whether some attention sees the last tokens only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "sliding_window", None) is not None or "sliding_attention" in kinds


def _ids(model: PreTrainedModel, count: int, start: int) -> list[int]:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return [(7 * place + start) % vocabulary for place in range(count)]


def _plain(model: PreTrainedModel) -> Tensor:
    """(3, V): logits at three places of a text."""
    ids = torch.tensor([_ids(model, LENGTH, 5)], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, [PIECE - 1, LENGTH - 2, LENGTH - 1]].float()


def _paged(model: PreTrainedModel) -> Tensor:
    """The same, from pages: a piece beside another text, a piece behind it, and a token beside one of the other's."""
    text, other = _ids(model, LENGTH, 5), _ids(model, OTHER + 1, 11)
    store = Store(-(-LENGTH // SIZE) + 1)
    own, its = tuple(range(store.pages - 1)), (store.pages - 1,)
    found = []

    def forward(units: list[Unit], ids: list[int], places: list[int], *, decoding: bool) -> None:
        pages = Pages(store, units, decoding=decoding)
        shape = (-1, 1) if decoding else (1, -1)
        given: dict[str, Any] = {PAGES: pages}
        with apart(pages):
            out = model(
                input_ids=torch.tensor(ids, device=model.device).view(shape),
                position_ids=torch.tensor(places, device=model.device).view(shape),
                use_cache=False,
                **given,
            )
        logits: Tensor = out.logits
        found.append(logits[0, units[0].count - 1].float())

    first = [Unit(own, 0, PIECE), Unit(its, 0, OTHER)]
    places = [*range(PIECE), *range(OTHER)]
    forward(first, text[:PIECE] + other[:OTHER], places, decoding=False)
    count = LENGTH - 1 - PIECE
    forward(
        [Unit(own, PIECE, count)], text[PIECE:-1], list(range(PIECE, LENGTH - 1)), decoding=False
    )
    second = [Unit(own, LENGTH - 1, 1), Unit(its, OTHER, 1)]
    forward(second, [text[-1], other[-1]], [LENGTH - 1, OTHER], decoding=True)
    return torch.stack(found)
