"""Which tokens may come next in an answer that has a grammar.

A guide follows one answer token by token, a pushdown automaton of xgrammar's. What is not allowed is taken out of the
logits before anything else is done to them; an end token is allowed where the text is whole, and nothing else then.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Sequence
from typing import Any, final

import numpy
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from trimtab.engine.grammars import Grammar
from trimtab.engine.vocabulary import Compilers, compilers, xgrammar
from trimtab.errors import AnswerError, ConfigError

PLACE = re.compile(r"^\[[\d:]+\] \S+: ")
"""Before what xgrammar has to say: the time, and a line of its source."""


@final
class Guide:
    """Follows one answer."""

    def __init__(self, matcher: Any, mask: Tensor, ends: Collection[int]) -> None:
        self._matcher = matcher
        self._mask = mask
        self._ends = ends
        self._taken = 0
        self._over = False
        matcher.fill_next_token_bitmask(mask)

    @property
    def stuck(self) -> bool:
        """Whether no token of the vocabulary can come next."""
        return not self._mask.any()

    def allowed(self, count: int) -> Tensor:
        """(count,) which of so many tokens may come next."""
        bits = numpy.unpackbits(
            self._mask.numpy().view(numpy.uint8), count=count, bitorder="little"
        )
        return torch.from_numpy(bits).view(torch.bool)

    def take(self, token: int) -> None:
        """The answer goes on with a token. After an end token anything may come, which is not of the answer."""
        self._taken += 1
        if token in self._ends:
            self._over = True
            self._mask.fill_(-1)
        elif not self._over and self._matcher.accept_token(token):
            self._matcher.fill_next_token_bitmask(self._mask)
        elif not self._over:
            self._mask.zero_()

    def follow(self, tokens: Sequence[int]) -> None:
        """Take those of an answer that are new. Raises `AnswerError` where it cannot go on."""
        for token in tokens[self._taken :]:
            self.take(token)
        if self.stuck:
            raise AnswerError(STUCK)


STUCK = "no token of the vocabulary can go on with the answer as its grammar demands."


@final
class Guides:
    """The guides of one tokenizer's answers; grammars are compiled once. For any thread."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], width: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._width = width
        self._ends = sorted(ends)
        self._compilers: Compilers | None = None
        self._reading = threading.Lock()

    def learn(self, grammar: Grammar | None) -> Any:
        """Compile a grammar, if it is none of the last ones; other threads go on meanwhile.

        Raises:
            ConfigError: what is wrong with it.
            ModelError: the tokenizer cannot be read.
            MissingPackageError: xgrammar is not installed.
        """
        if grammar is None:
            return None
        with self._reading:
            if self._compilers is None:
                self._compilers = compilers(self._tokenizer, self._ends, self._width)
        try:
            return grammar.compiled(self._compilers)
        except (ValueError, RuntimeError) as error:
            said = PLACE.sub("", str(error).strip())
            raise ConfigError(f"{grammar} cannot be kept: {said}") from None

    def of(self, grammar: Grammar | None) -> Guide | None:
        """A guide of an answer that begins; raises as `learn`."""
        known = self.learn(grammar)
        if known is None:
            return None
        package = xgrammar()
        matcher = package.GrammarMatcher(known, override_stop_tokens=self._ends)
        mask = package.allocate_token_bitmask(1, known.tokenizer_info.vocab_size)
        guide = Guide(matcher, mask[0], self._ends)
        if guide.stuck:
            raise ConfigError(f"{grammar} cannot be kept: no text of the vocabulary fits.")
        return guide

    def each(self, grammar: Grammar | None, count: int) -> list[Guide]:
        """Guides of so many answers; none where there is no grammar."""
        return [guide for _ in range(count) if (guide := self.of(grammar)) is not None]


@final
class Guided(LogitsProcessor):  # type: ignore[misc]
    """For transformers' ``generate``: a guide for each row, whose answer begins at ``start``."""

    def __init__(self, guides: Sequence[Guide], start: int) -> None:
        self.guides = guides
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for guide, row in zip(self.guides, input_ids[:, self.start :].tolist(), strict=True):
            guide.follow(row)
        return masked(scores, self.guides)


def masked(logits_BV: Tensor, guides: Sequence[Guide]) -> Tensor:
    """The logits, −∞ where a row's guide does not allow a token."""
    allowed = torch.stack([guide.allowed(logits_BV.shape[1]) for guide in guides])
    return logits_BV.masked_fill(~allowed.to(logits_BV.device), float("-inf"))
