"""Losses of documents, from the log-probabilities of their tokens.

    loss_d = f( log p_n, w_n, … ),   over the tokens n of document d that have a weight w_n

The head gives −log p of each target with its gradient (`trimtab.losses.cross_entropy`), so that a loss of any kind is
a function of few numbers, and no logits are kept for it. All are sums: nothing is averaged here.

Legend: K tokens with a weight, D documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.config import Config
from trimtab.errors import ConfigError
from trimtab.losses.cross_entropy import PLAIN, Form


class Document(NamedTuple):
    """Of one document, for each token that has a weight: its log-probability, with a gradient; the weight; and what was
    given with the data (0 where it was not): the log-probability it had elsewhere, and its advantage. Each (K,)."""

    logp: Tensor
    weights: Tensor
    logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """Those of D documents. ``each_K`` is what `TokenLoss` gives, ``document_K`` the number of each token's document;
    ``logprobs_K`` and ``advantages_K`` were given with the data (0 where they were not)."""

    each_K: Tensor
    weights_K: Tensor
    document_K: Tensor
    documents: int
    logprobs_K: Tensor
    advantages_K: Tensor

    @property
    def logp_K(self) -> Tensor:
        """log p of each token (of a loss whose form is plain)."""
        return -self.each_K

    def sums(self, values_K: Tensor) -> Tensor:
        """(D,) the weighted sums."""
        zeros = values_K.new_zeros(self.documents)
        return zeros.index_add(0, self.document_K, values_K * self.weights_K.to(values_K.dtype))

    def means(self, values_K: Tensor) -> Tensor:
        """(D,) the weighted means, without a gradient."""
        values_K = values_K.detach()
        whole = self.sums(torch.ones_like(values_K))
        return self.sums(values_K) / torch.where(whole == 0, 1.0, whole)

    def split(self) -> list[Document]:
        """Document by document."""
        found = []
        for number in range(self.documents):
            own = self.document_K == number
            values = self.logp_K, self.weights_K, self.logprobs_K, self.advantages_K
            found.append(Document(*(value[own] for value in values)))
        return found


@dataclass(frozen=True, slots=True)
class Terms:
    """The loss of each document, (D,) with a gradient; and what else is told of them, each (D,) without."""

    losses_D: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Reference(NamedTuple):
    """Whose log-probabilities a loss compares with: an adapter's, or the bare base's (None)."""

    adapter: str | None


class Loss(Config, ABC):
    """What is learnt from some data. Abstract.

    ``uses`` names what a datum may bring with it for this loss, ``needs`` what it must: ``logprobs``, ``advantages``.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def together(self) -> int:
        """How many data, one after the other, the loss is of."""
        return 1

    @property
    def form(self) -> Form:
        """Of the loss of a token."""
        return PLAIN

    @property
    def compared(self) -> Reference | None:
        """Whose log-probabilities stand for ``logprobs`` of data that have none."""
        return None

    def counts(self, weight: float) -> float:
        """What a datum whose tokens have that weight counts, where a step divides by what its data count."""
        return weight

    @abstractmethod
    def terms(self, tokens: Tokens) -> Terms:
        """The losses of documents; those that belong together follow one another."""


@final
class Likelihood(Loss):
    """Σ w · −log p, with label smoothing and a z-loss where the form says so."""

    token: Form = PLAIN

    @property
    def form(self) -> Form:
        return self.token

    def terms(self, tokens: Tokens) -> Terms:
        return Terms(tokens.sums(tokens.each_K))


@final
class Custom(Loss):
    """A loss of one's own: ``function`` gives one number for ``size`` data, one after the other, from their
    log-probabilities. The weights are its to use."""

    uses: ClassVar[tuple[str, ...]] = ("logprobs", "advantages")

    function: Callable[[Sequence[Document]], Tensor]
    size: int = Field(default=1, ge=1)

    @property
    def together(self) -> int:
        return self.size

    def terms(self, tokens: Tokens) -> Terms:
        documents = tokens.split()
        found = []
        for start in range(0, len(documents), self.size):
            value = self.function(documents[start : start + self.size])
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ConfigError(
                    f"a custom loss gives one number, a tensor; this one gave {value!r}."
                )
            found.append(value.reshape(()))
        return Terms(torch.stack(found).repeat_interleave(self.size) / self.size)
