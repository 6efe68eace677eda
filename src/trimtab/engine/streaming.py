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
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.engine.sampling import (
    Completion,
    Finite,
    SamplingParams,
    decoded,
    end_ids,
    ended,
    generation_config,
    last_only,
)
from trimtab.engine.serve.request import Words
from trimtab.errors import ConfigError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that stands for one byte, in vocabularies that fall back to bytes."""
BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""


@final
class Stream(Iterator[str]):
    """The pieces of one answer, in order; none is empty. Joined, they are the text of `completion`.

    Args:
        tokens: makes the answer's tokens, one by one; asked with the first piece.

    Raises:
        ConfigError: ``params.n`` is not 1.
    """

    def __init__(
        self, words: Words, params: SamplingParams, tokens: Callable[[], Iterator[int]]
    ) -> None:
        if params.n != 1:
            raise ConfigError(f"a stream is one completion; n = {params.n} are asked for.")
        self._tokenizer = words.tokenizer
        self._params = params
        self._ends = words.ends
        self._tokens: list[int] = []
        self._completion: Completion | None = None
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
        self._finish()

    @property
    def completion(self) -> Completion:
        """The answer so far; at the end, what `Engine.sample` gives."""
        if self._completion is None:
            return Completion(
                0, *ended(self._tokens, self._tokenizer, self._params.stop, self._ends)
            )
        return self._completion

    def _finish(self) -> None:
        if self._completion is None:
            self._completion = self.completion

    def _run(self, tokens: Callable[[], Iterator[int]]) -> Generator[str]:
        said = ""
        for token in tokens():
            self._tokens.append(token)
            if token in self._ends:
                break
            text = decoded(self._tokenizer, self._tokens)
            if any(stop in text for stop in self._params.stop):
                break
            settled = self._settled(text)
            if len(settled) > len(said) and settled.startswith(said):
                yield settled[len(said) :]
                said = settled
        self._finish()
        rest = self.completion.text[len(said) :]
        if rest:
            yield rest

    def _settled(self, text: str) -> str:
        """The part of ``text`` that stays as it is, whatever follows."""
        last = self._tokenizer.convert_ids_to_tokens(self._tokens[-1])
        if isinstance(last, str) and BYTE.fullmatch(last):
            return ""  # a run of bytes is decoded as a whole
        text = text.rstrip(BROKEN)
        held = max((_overlap(text, stop) for stop in self._params.stop), default=0)
        return text[: len(text) - held]


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
) -> Iterator[int]:
    """Tokens by the model's own ``generate``, at most ``params.max_tokens``; the caller says when it has enough."""
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
                logits_processor=LogitsProcessorList([Finite()]),
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
