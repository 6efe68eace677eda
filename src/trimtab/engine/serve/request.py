"""One completion that is asked for: its text so far, its place in the pages, and how it ended."""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from transformers import PreTrainedTokenizerBase

from trimtab.engine.sampling import Completion, Finish, SamplingParams, decoded, ended
from trimtab.engine.serve.seats import NONE

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter

STEP = 0x9E3779B97F4A7C15
"""Between the seeds of a prompt's completions."""


@dataclass(frozen=True, slots=True)
class Words:
    """What ends an answer, and how tokens become text."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]


@final
@dataclass(eq=False, slots=True)
class Request:
    """``number`` is the index of its prompt among those that were sent together, ``turn`` which of the prompt's
    completions it is. ``behind`` is a request with the same prompt, whose pages it waits for."""

    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: Adapter | None
    words: Words
    number: int = 0
    turn: int = 0
    behind: Request | None = None
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[Mapping[int, float]] = field(default_factory=list)
    cancelled: bool = False

    pages: list[int] = field(default_factory=list)
    filled: int = 0
    """Positions of its pages that hold something."""
    lead: int = 0
    """How many of them are virtual tokens."""
    root: Hashable = None
    """What its pages are known by, or None where they are not to be found by others."""
    reach: tuple[float, int] = (1.0, 0)
    """How far its adapter goes (`trimtab.scale`), and how many blocks it is left out of."""
    slot: int = NONE
    """Where its adapter's values lie; `NONE` where the adapter acts by its name."""
    memory: dict[Any, Any] = field(default_factory=dict)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        seed = self.params.seed
        own = secrets.randbits(63) if seed is None else seed + self.turn * STEP
        self.generator = torch.Generator().manual_seed(own % 2**63)

    @property
    def name(self) -> str:
        """Of its adapter; empty for the bare base."""
        return "" if self.adapter is None else self.adapter.name

    @property
    def owner(self) -> tuple[str, ...]:
        """Who acts on it by name."""
        return (self.name,) if self.name and self.slot == NONE else ()

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
        return self.adapter is not None and any(m.remembers for m in self.adapter.methods)

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
