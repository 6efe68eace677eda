"""Completions, one batch at a time, each prompt by its own adapter.

Greedy at temperature 0. Random draws come from a generator state of their own, so that sampling in the
middle of training changes nothing of the training.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, InstanceOf, field_validator
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from trimtab.config import Config
from trimtab.data import plan_batches
from trimtab.engine.grammars import Grammar
from trimtab.engine.guide import Guide, Guided
from trimtab.errors import AnswerError

Finish = Literal["stop", "length", "cancelled"]
"""Why a completion ended: by itself or at a stop string, at ``max_tokens``, or because nobody wanted more."""


class SamplingParams(Config):
    """How to answer. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 (a share of the likeliest
    token's probability) keep the whole vocabulary; ``repetition_penalty`` divides what speaks for tokens that the text
    has already; ``n`` completions of each prompt; a ``stop`` string ends a completion and is not part of its text;
    ``logprobs``: the log-probabilities of the tokens are given, and of so many of the likeliest at each place (those of
    the model, whatever is drawn from); ``grammar``: what the text has to be (`trimtab.engine.grammars`), as far as
    ``max_tokens`` reach."""

    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = Field(default=1, ge=1)
    logprobs: int | None = Field(default=None, ge=0)
    grammar: InstanceOf[Grammar] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        found = (value,) if isinstance(value, str) else tuple(value or ())
        if "" in found:
            raise ValueError("an empty stop string would stop everything")
        return found


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: the ``prompt`` it is for (an index), its ``tokens`` (the end token included, if it came),
    its ``text`` without control tokens, and why it ended. Where they were asked for, ``logprobs`` of its tokens, and
    ``likeliest``: at each place, of some tokens."""

    prompt: int
    tokens: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: tuple[float, ...] | None = None
    likeliest: tuple[Mapping[int, float], ...] | None = None


def batches(prompts: Sequence[Sequence[int]], max_tokens: int, budget: int) -> list[list[int]]:
    """Indices of prompts by batch, so that prompts and answers fill at most ``budget`` cells (or one row)."""
    lengths = [len(prompt) + max_tokens for prompt in prompts]
    return plan_batches(lengths, max(budget, max(lengths)))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seed: int | None,
    guides: Sequence[Guide] = (),
) -> list[tuple[tuple[int, ...], str, Literal["stop", "length"]]]:
    """(tokens, text, finish) of one batch; the caller has routed the rows and set eval mode. ``guides`` are those of
    the rows, or none."""
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    pad = int(tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = end_ids(model, tokenizer)
    stopping = [_StopStrings(tokenizer, params.stop, width, ends)] if params.stop else []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if params.temperature > 0:
            torch.seed() if seed is None else torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation_config(params, ends, pad),
            stopping_criteria=stopping,
            logits_processor=processors(guides, width),
            **last_only(model),
        )
    return [ended(row[width:].tolist(), tokenizer, params.stop, ends) for row in out]


def processors(guides: Sequence[Guide], start: int) -> LogitsProcessorList:
    """What looks at logits before temperature and cuts: they are numbers, and the guides allow what is left."""
    return LogitsProcessorList([Finite(), *([Guided(guides, start)] if guides else [])])


def last_only(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Only the last position goes through the head, as an index rather than a slice.

    `generate` asks for the slice ``[-1:]`` of the prompt's hidden states, which is not contiguous; torch then
    multiplies it by a copy of the head's weight *for every row* (gigabytes, for a hundred rows). Indexing copies
    the hidden states instead.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=model.device)}


def generation_config(params: SamplingParams, ends: list[int], pad: int) -> GenerationConfig:
    """Everything said, so that nothing comes from the model's own generation defaults."""
    greedy = params.temperature == 0
    return GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=not greedy,
        temperature=1.0 if greedy else params.temperature,
        top_p=1.0 if greedy else params.top_p,
        top_k=50 if greedy else params.top_k,
        typical_p=1.0,
        min_p=None if greedy or params.min_p == 0 else params.min_p,
        repetition_penalty=params.repetition_penalty,
        no_repeat_ngram_size=0,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(int(e) for e in [*listed, tokenizer.eos_token_id] if e is not None))


def ended(
    tokens: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[str],
    ends: Collection[int],
) -> tuple[tuple[int, ...], str, Literal["stop", "length"]]:
    """Cut one row at its end token or stop string."""
    finish: Literal["stop", "length"] = "length"
    for place, token in enumerate(tokens):
        if token in ends:
            tokens, finish = tokens[: place + 1], "stop"
            break
    text = decoded(tokenizer, tokens)
    places = [text.index(stop) for stop in stops if stop in text]
    if places:
        text, finish = text[: min(places)], "stop"
        tokens = _shortest(tokenizer, tokens, text, stops)
    return tuple(tokens), text, finish


def _shortest(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], text: str, stops: Sequence[str]
) -> list[int]:
    """The tokens up to the one that completes the stop string (rows of a batch may run on)."""
    for count in range(1, len(tokens)):
        said = decoded(tokenizer, tokens[:count])
        if any(stop in said for stop in stops):
            return tokens[:count]
    return tokens


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of tokens, without control tokens."""
    return str(
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


class Finite(LogitsProcessor):  # type: ignore[misc]
    """Raises `AnswerError` where logits are no numbers, of which something would be chosen all the same."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.amax(-1).isfinite().all()):
            raise AnswerError(
                "the adapters of this batch, or the base, give logits that are not finite; weights may have been "
                "damaged in training."
            )
        return scores


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when its text has a stop string."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        start: int,
        ends: Sequence[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.start = start
        # A stop string may lie across tokens; no token is shorter than a byte.
        self.tail = max(len(stop.encode()) for stop in stops) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = input_ids[:, self.start :][:, -self.tail :].tolist()
        said = [decoded(self.tokenizer, row) for row in rows]
        hits = [any(stop in text for stop in self.stops) for text in said]
        return torch.tensor(hits, device=input_ids.device)
