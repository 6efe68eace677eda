"""One completion that is asked for: its text so far, its place in the pages, and how it ended."""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from transformers import PreTrainedTokenizerBase

from trimtab.engine.guide import STUCK, Guide, Guides
from trimtab.engine.sampling import Completion, Finish, SamplingParams, decoded, ended
from trimtab.engine.serve.actors import Actor
from trimtab.engine.serve.seats import NONE
from trimtab.errors import AnswerError

STEP = 0x9E3779B97F4A7C15
"""Between the seeds of a prompt's completions."""


@dataclass(frozen=True, slots=True)
class Words:
    """What ends an answer, and how tokens become text; ``width`` is how many tokens the model can say, where known."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    width: int | None = None
    guides: Guides = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guides", Guides(self.tokenizer, self.ends, self.width))


@final
@dataclass(eq=False, slots=True)
class Request:
    """``number`` is the index of its prompt among those that were sent together, ``turn`` which of the prompt's
    completions it is. ``behind`` is a request with the same prompt, whose pages it waits for. Those of another ``salt``
    do not find what it has read. Raises what `Guides.learn` raises of its grammar."""

    prompt: tuple[int, ...]
    params: SamplingParams
    actor: Actor
    words: Words
    number: int = 0
    turn: int = 0
    behind: Request | None = None
    salt: str | None = None
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[Mapping[int, float]] = field(default_factory=list)
    cancelled: bool = False

    pages: list[int] = field(default_factory=list)
    filled: int = 0
    """Positions of its pages that hold something."""
    root: Hashable = None
    """Who acts on its text, at which version; None where its pages are not to be found by others."""
    memory: dict[Any, Any] = field(default_factory=dict)
    generator: torch.Generator = field(init=False)
    guide: Guide | None = field(init=False)
    """What its grammar allows next; it stays with the request when its pages are taken."""

    def __post_init__(self) -> None:
        seed = self.params.seed
        own = secrets.randbits(63) if seed is None else seed + self.turn * STEP
        self.generator = torch.Generator().manual_seed(own % 2**63)
        self.guide = self.words.guides.of(self.params.grammar)

    @property
    def name(self) -> str:
        """Of its adapter; empty for the bare base."""
        return self.actor.name

    @property
    def slot(self) -> int:
        """Where its adapter's values lie; `NONE` where the adapter acts by its name."""
        return self.actor.slot

    @property
    def lead(self) -> int:
        """How many of the positions of its pages are virtual tokens."""
        return self.actor.lead

    @property
    def owner(self) -> tuple[str, ...]:
        """Who acts on it by name."""
        return (self.name,) if self.name and self.slot == NONE else ()

    @property
    def known_by(self) -> Hashable:
        """What its pages are found by, beside the tokens in them."""
        return self.salt, self.root

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def text(self) -> list[int]:
        """Its tokens so far, those of the prompt first."""
        return [*self.prompt, *self.tokens]

    @property
    def most(self) -> int:
        """The positions that it may come to fill; the last token is not read."""
        return self.lead + len(self.prompt) + self.params.max_tokens - 1

    @property
    def read(self) -> int:
        """How many tokens of its text lie in its pages."""
        return max(self.filled - self.lead, 0)

    @property
    def unread(self) -> int:
        return len(self.prompt) + len(self.tokens) - self.read

    @property
    def answering(self) -> bool:
        """Whether all but its last token has been read, so that the next one can be told."""
        return bool(self.tokens) and self.unread == 1

    @property
    def remembers(self) -> bool:
        """Whether its adapter decides something at its prompt; it then has its prompt read by itself."""
        return self.actor.remembers

    def cancel(self) -> None:
        """Ask for no more of it. What has come so far stays."""
        self.cancelled = True

    def take(self, token: int) -> None:
        """One more token, which may be the last."""
        self.tokens.append(token)
        if token in self.words.ends or self._stopped():
            self.finish = "stop"
        elif len(self.tokens) >= self.params.max_tokens:
            self.finish = "length"
        elif self.guide is not None:
            self.guide.take(token)
            if self.guide.stuck:
                self.error = AnswerError(STUCK)

    def _stopped(self) -> bool:
        stops = self.params.stop
        if not stops:
            return False
        tail = max(len(stop.encode()) for stop in stops) + 4  # no token is shorter than a byte
        said = decoded(self.words.tokenizer, self.tokens[-tail:])
        return any(stop in said for stop in stops)

    def completion(self) -> Completion:
        """What has come, cut at a stop string; raises `error`, if there is one."""
        if self.error is not None:
            raise self.error
        words, stops = self.words, self.params.stop
        finish: Finish
        tokens, text, finish = ended(self.tokens, words.tokenizer, stops, words.ends)
        if self.finish == "cancelled" and finish == "length":
            finish = "cancelled"
        if self.params.logprobs is None:
            return Completion(self.number, tokens, text, finish)
        own = slice(0, len(tokens))
        pair = tuple(self.logprobs[own]), tuple(self.likeliest[own])
        return Completion(self.number, tokens, text, finish, *pair)
