"""How long an example may be, and of which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import Method
from trimtab.data import Datum
from trimtab.engine.head import Head
from trimtab.engine.micro import Who
from trimtab.errors import DataError


def context(model: PreTrainedModel, methods: Iterable[Method]) -> int | None:
    """The most tokens of one example: the model's positions, less those that these methods take."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    return int(limit) - sum(m.virtual_tokens + m.prompt_tokens for m in methods)


def check_length(model: PreTrainedModel, length: int, methods: Iterable[Method], what: str) -> None:
    """Raise `DataError` for more tokens than the context has."""
    limit = context(model, methods)
    if limit is not None and length > limit:
        raise DataError(
            f"{what}: {length} tokens, more than the model's context of {limit}. Shorten it."
        )


def check_ids(model: PreTrainedModel, ids: Sequence[int], what: str) -> None:
    """Raise `DataError` for a token that the vocabulary does not have: a device would only say so for a whole batch."""
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if size is not None and ids and not (min(ids) >= 0 and max(ids) < size):
        wrong = next(token for token in ids if not 0 <= token < size)
        raise DataError(
            f"{what}: there is no token {wrong}; the model's vocabulary has 0 to {size - 1}. Was this text tokenised "
            "for another model?"
        )


def check(model: PreTrainedModel, head: Head, data: Sequence[Datum], owners: Sequence[Who]) -> None:
    """Raise `DataError` for a datum that is too long, has tokens of no vocabulary, or is none for this model's head."""
    for datum, owner in zip(data, owners, strict=True):
        methods = () if owner is None else bank_of(model).require(owner).methods
        what = datum.origin or "an example"
        check_length(model, len(datum), methods, what)
        check_ids(model, datum.tokens, what)
        if not head.labels:  # else they are classes
            learnt = [t for t, weight in zip(datum.targets, datum.weights, strict=True) if weight]
            check_ids(model, learnt, what)
        head.check(datum)
