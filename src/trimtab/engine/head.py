"""From a forward to the loss: positions without weight are dropped before the output head.

Three ways, the first that the model allows:

1. run the backbone, pick the hidden states of weighted tokens, and go through the head in chunks
   (`trimtab.losses.linear_cross_entropy`). Whether the head is only a linear layer on the backbone's
   last hidden state, with or without the soft cap that Gemma's config names, is *verified* on a few tokens,
   because models change their logits in ways of their own;
2. where the head holds adapters, call it on the picked hidden states (one owner for all rows);
3. full logits.

A model that gives one row of logits for a whole text has a head of its own kind (`trimtab.engine.class_head`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from trimtab.adapt.site import SiteBase
from trimtab.data import Batch, Datum
from trimtab.errors import UnsupportedError
from trimtab.losses import Form, TokenLoss, linear_cross_entropy, weighted_cross_entropy

Forms = Sequence[tuple[Form, Tensor]]
"""The forms that a token's loss has here, and the numbers of the kept positions that have each."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The K positions with a weight: ``index`` into the flattened (B·T) cells, ``document`` numbers, targets
    and weights; each (K,)."""

    index: Tensor
    document: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Kept:
        """Positions of ``batch`` whose weight is not 0."""
        numbers = torch.full(batch.weights.shape, -1)
        for number, document in enumerate(batch.documents):
            numbers[document.row, document.start : document.stop] = number
        index = batch.weights.flatten().nonzero()[:, 0]
        return cls(
            index,
            numbers.flatten().to(index.device)[index],
            batch.targets.flatten()[index],
            batch.weights.flatten()[index],
        )


class Head(ABC):
    """How one model's loss is computed. Made on the bare base, where the head can be verified."""

    labels: tuple[str, ...] = ()
    """The names of the classes of a sequence classifier."""

    def check(self, datum: Datum) -> None:  # noqa: B027 (tokens fit any head over tokens)
        """Raise `DataError` where ``datum`` is none that this head can learn from."""

    @abstractmethod
    def loss(
        self, inputs: dict[str, Tensor], kept: Kept, forms: Forms, *, together: bool
    ) -> TokenLoss:
        """Run the model and the loss. ``together``: one owner acts on all rows."""


def formed(
    rows_KX: Tensor,
    kept: Kept,
    forms: Forms,
    take: Callable[[Tensor, Tensor, Tensor, Form], TokenLoss],
) -> TokenLoss:
    """The loss of what the model says of each kept position, where positions may differ in its form."""
    if len(forms) == 1:
        return take(rows_KX, kept.targets, kept.weights, forms[0][0])
    found = [
        take(rows_KX[index], kept.targets[index], kept.weights[index], form)
        for form, index in forms
    ]
    order = torch.cat([index for _, index in forms]).argsort()
    nll, best, each = (
        torch.cat(parts)[order]
        for parts in zip(*((one.nll, one.best, one.each) for one in found), strict=True)
    )
    return TokenLoss(torch.stack([one.loss for one in found]).sum(), nll, best, each)


@final
class TokenHead(Head):
    """The head of a language model, or any that gives logits for each token."""

    def __init__(self, model: nn.Module, head: nn.Linear | None, cap: float | None = None) -> None:
        self._model = model
        self._plain = head
        self._cap = cap

    @classmethod
    def of(cls, model: nn.Module) -> TokenHead:
        """Look at a model, with no adapter acting."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        bare = head.base_layer if isinstance(head, SiteBase) else head
        if type(bare) is nn.Linear:
            cap = _cap(model)
            if _is_plain(model, bare, cap):
                return cls(model, bare, cap)
        return cls(model, None)

    def loss(
        self, inputs: dict[str, Tensor], kept: Kept, forms: Forms, *, together: bool
    ) -> TokenLoss:
        if self._plain is not None:
            capped = [(form._replace(cap=self._cap), index) for form, index in forms]
            head = self._model.get_output_embeddings()  # type: ignore[operator]
            if head is self._plain and not self._plain.weight.requires_grad:
                return formed(self._picked(inputs, kept), kept, capped, self._chunked)
            if together:
                logits = head(self._picked(inputs, kept)[None])[0]
                return formed(logits, kept, capped, weighted_cross_entropy)
        logits = self._model(**inputs, **uncached(self._model)).logits
        if logits.dim() != 3:
            raise UnsupportedError(
                f"{type(self._model).__name__} gives logits of shape {tuple(logits.shape)}; the loss over "
                "tokens needs (rows, tokens, vocabulary)."
            )
        picked = logits.flatten(0, 1).index_select(0, kept.index)
        return formed(picked, kept, forms, weighted_cross_entropy)

    def _chunked(self, hidden: Tensor, targets: Tensor, weights: Tensor, form: Form) -> TokenLoss:
        """From hidden states, without all logits."""
        assert self._plain is not None
        bias = self._plain.bias
        return linear_cross_entropy(hidden, self._plain.weight, targets, weights, bias, form)

    def _picked(self, inputs: dict[str, Tensor], kept: Kept) -> Tensor:
        backbone = _backbone(self._model)
        hidden: Tensor = backbone(**inputs, **uncached(self._model)).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, kept.index)


def _backbone(model: nn.Module) -> nn.Module:
    inner = model._modules.get(str(model.base_model_prefix))
    if inner is None:
        raise AssertionError("only verified models get here")
    return inner


def uncached(model: nn.Module) -> dict[str, bool]:
    """A decoder is told to keep no cache; an encoder does not know the word."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


CAP = "final_logit_softcapping"


def _cap(model: nn.Module) -> float | None:
    """Where the config says that logits are capped softly."""
    return getattr(model.config.get_text_config(), CAP, None)  # type: ignore[union-attr, operator]


@torch.no_grad()
def _is_plain(model: nn.Module, head: nn.Linear, cap: float | None) -> bool:
    """Whether ``logits == head(last_hidden_state)`` exactly, but for the cap, and no other option of the config
    touches them."""
    inner = model._modules.get(str(model.base_model_prefix))
    if inner is None:
        return False
    options = model.config.get_text_config().to_dict()  # type: ignore[union-attr, operator]
    known = (CAP, "attn_logit_softcapping")
    others = {key: value for key, value in options.items() if "logit" in key and key not in known}
    if any(value not in (None, False, 1, 1.0) for value in others.values()):
        return False  # a scale that small logits would not show
    device = head.weight.device
    ids = (torch.arange(4, device=device)[None] * 7 + 5) % int(options["vocab_size"])
    training = model.training
    try:
        model.eval()
        logits = model(input_ids=ids, **uncached(model)).logits
        hidden = inner(input_ids=ids, **uncached(model)).last_hidden_state
        own = head(hidden)
        return bool(torch.equal(own if cap is None else torch.tanh(own / cap) * cap, logits))
    except (AttributeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
