"""One completion, token by token, as it is made.

Its tokens are those of a request among others (`trimtab.engine.serve`). Where keys and values cannot lie in pages, each
is one call of the model's own ``generate``, with the cache of the last, under the adapter's route and from the stream's
own random state. So a stream is exactly what `Engine.sample` gives for the same prompt and parameters, and between two
pieces nothing of it is in force: the consumer may do as it likes, another stream included, and leaving it stops the
work.

A piece of text is given when nothing that follows can change it: not in the middle of a character whose bytes
are spread over tokens, and not where a stop string may have begun.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.engine.guide import Guide
from trimtab.engine.sampling import (
    Completion,
    SamplingParams,
    decoded,
    end_ids,
    ended,
    generation_config,
    last_only,
    processors,
)
from trimtab.engine.serve.request import Words
from trimtab.errors import ConfigError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that stands for one byte, in vocabularies that fall back to bytes."""
BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""


@final
class Telling:
    """The text of one answer, whose tokens are given one by one: the piece that a token settles, which may be empty.
    All pieces and the `rest`, joined, are the text of `completion`."""

    def __init__(self, words: Words, params: SamplingParams) -> None:
        self._words = words
        self._params = params
        self._tokens: list[int] = []
        self._said = ""
        self.over = False
        """Whether an end token or a stop string has come."""

    def add(self, token: int) -> str:
        """What can be said with one more token."""
        self._tokens.append(token)
        if token in self._words.ends:
            self.over = True
            return ""
        text = decoded(self._words.tokenizer, self._tokens)
        if any(stop in text for stop in self._params.stop):
            self.over = True
            return ""
        settled = self._settled(text)
        if not settled.startswith(self._said):
            return ""
        piece, self._said = settled[len(self._said) :], settled
        return piece

    def rest(self) -> str:
        """What is left to be said when no further token comes."""
        piece = self.completion.text[len(self._said) :]
        self._said += piece
        return piece

    @property
    def completion(self) -> Completion:
        """The answer so far."""
        words = self._words
        return Completion(0, *ended(self._tokens, words.tokenizer, self._params.stop, words.ends))

    def _settled(self, text: str) -> str:
        """The part of ``text`` that stays as it is, whatever follows."""
        last = self._words.tokenizer.convert_ids_to_tokens(self._tokens[-1])
        if isinstance(last, str) and BYTE.fullmatch(last):
            return ""  # a run of bytes is decoded as a whole
        text = text.rstrip(BROKEN)
        held = max((_overlap(text, stop) for stop in self._params.stop), default=0)
        return text[: len(text) - held]


@final
class Stream(Iterator[str]):
    """The pieces of one answer, in order; none is empty. Joined, they are the text of `completion`.

    Args:
        tokens: makes the answer's tokens, one by one; asked with the first piece.

    Raises:
        ConfigError: ``params.n`` is not 1; or as `Guides.learn`.
    """

    def __init__(
        self, words: Words, params: SamplingParams, tokens: Callable[[], Iterator[int]]
    ) -> None:
        check(words, params)
        self._telling = Telling(words, params)
        self._pieces = self._run(tokens)

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: no further token is made. What has come so far stays in `completion`."""
        self._pieces.close()

    @property
    def completion(self) -> Completion:
        """The answer so far; at the end, what `Engine.sample` gives."""
        return self._telling.completion

    def _run(self, tokens: Callable[[], Iterator[int]]) -> Generator[str]:
        for token in tokens():
            if piece := self._telling.add(token):
                yield piece
            if self._telling.over:
                break
        if rest := self._telling.rest():
            yield rest


def check(words: Words, params: SamplingParams) -> None:
    """Raise where an answer cannot be given in pieces: `ConfigError`, or as `Guides.learn`."""
    if params.n != 1:
        raise ConfigError(f"a stream is one completion; n = {params.n} are asked for.")
    words.guides.learn(params.grammar)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def tokens_alone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    params: SamplingParams,
    scope: Callable[[], AbstractContextManager[None]],
    guides: Sequence[Guide] = (),
) -> Iterator[int]:
    """Tokens by the model's own ``generate``, at most ``params.max_tokens``; the caller says when it has enough.
    ``guides`` are the answer's, or none."""
    pad = int(tokenizer.pad_token_id)
    config = generation_config(params.replace(max_tokens=1), end_ids(model, tokenizer), pad)
    config.return_dict_in_generate = True
    draws = _Draws(model.device, params)
    ids = torch.tensor([list(prompt)], device=model.device)
    # A model that keeps its state otherwise is shown the whole text anew for each token.
    keeps = "past_key_values" in inspect.signature(model.forward).parameters
    cache: dict[str, Any] = {}
    for _ in range(params.max_tokens):
        with draws, scope(), torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=processors(guides, len(prompt)),
                **cache,
                **last_only(model),
            )
        ids = out.sequences
        if keeps:
            cache = {"past_key_values": out.past_key_values}
        yield int(ids[0, -1])


class _Draws:
    """The stream's own random state, in force inside the ``with``; outside, the process's is as it was."""

    def __init__(self, device: torch.device, params: SamplingParams) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._params = params
        self._own: list[Tensor] | None = None

    def __enter__(self) -> None:
        self._fork: Any = torch.random.fork_rng(devices=self._devices)
        self._fork.__enter__()
        if self._own is not None:
            torch.set_rng_state(self._own[0])
            for device, state in zip(self._devices, self._own[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
        elif self._params.temperature > 0:
            if self._params.seed is None:
                torch.seed()
            else:
                torch.manual_seed(self._params.seed)

    def __exit__(self, *error: Any) -> None:
        self._own = [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(device) for device in self._devices),
        ]
        self._fork.__exit__(*error)
