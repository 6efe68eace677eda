"""Prompts in an encoder: they see the text, so the sequence really grows.

Each row becomes  [leading padding | its owner's prompt | text | nothing], as long as the longest prompt asks for;
rows of the bare base have their text where it was, and nobody sees the nothing at the end. Positions count
through. The encoder of an encoder-decoder keeps the prompts in its output, and the decoder's cross-attention sees
them; elsewhere they are taken out again, unless the head pools one position (as PEFT has it, then the prompt's
first).

Shapes: B rows, T tokens of the text, N tokens of all prompts together, L = T + the longest prompt, D width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from trimtab.adapt.context import Context
from trimtab.adapt.interleave import Rows
from trimtab.adapt.route import Owner
from trimtab.errors import RouteError, UnsupportedError

_POOLED = ("ForSequenceClassification", "ForMultipleChoice")
"""Heads that pool the first position. (A decoder's, called ``score``, looks for the last token of the ids.)"""
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"}
Embed = Callable[[Owner], Tensor]
"""The prompt of an owner, (n, D)."""


class Growth(ABC):
    """What happens to one stack's inputs and output. Abstract; both kinds are final."""

    @staticmethod
    def of(root: nn.Module, stack: nn.Module, encoder_decoder: bool) -> Growth | None:
        """What a stack needs; None for one that is no part of a transformers model."""
        if not isinstance(root, PreTrainedModel):
            return None
        if encoder_decoder and stack is root.get_decoder():
            return CrossGrowth()
        if not encoder_decoder and root.can_generate():
            return DecoderGrowth(stack)
        pooled = type(root).__name__.endswith(_POOLED) and "score" not in root._modules
        return EncoderGrowth(stack, keeps=encoder_decoder or pooled)

    @abstractmethod
    def enter(
        self, context: Context, sizes: Mapping[Owner, int], embed: Embed, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The stack's arguments, with prompts of these lengths."""

    def leave(self, context: Context, out: Any) -> Any:
        """What the rest of the model sees of its output."""
        return out


@final
class CrossGrowth(Growth):
    """A decoder: its cross-attention sees the prompts that the encoder read."""

    def enter(
        self, context: Context, sizes: Mapping[Owner, int], embed: Embed, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        states = kwargs.get("encoder_hidden_states")
        mask = kwargs.get("encoder_attention_mask")
        if states is None or (mask is not None and mask.shape[1] == states.shape[1]):
            return kwargs
        rows, length = states.shape[0], states.shape[1] - max(sizes.values())
        if length < 1 or (mask is not None and mask.shape[1] != length):
            raise RouteError(
                f"the encoder's output has {states.shape[1]} positions, which are not those of the text and of the "
                "adapters' prompts; run encoder and decoder under the same adapters."
            )
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.long, device=states.device)
        spread = Rows.of(context.route, sizes, mask, rows, length).spread(mask, 1, 0)
        return {**kwargs, "encoder_attention_mask": spread}


@final
class EncoderGrowth(Growth):
    """An encoder; ``keeps`` says that the rest of the model sees the prompts' positions."""

    def __init__(self, stack: nn.Module, keeps: bool) -> None:
        self.stack = stack
        self.keeps = keeps

    def enter(
        self, context: Context, sizes: Mapping[Owner, int], embed: Embed, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        ids = kwargs.get("input_ids")
        x = kwargs["inputs_embeds"] if ids is None else self._embedding(ids)
        rows, length = x.shape[:2]
        mask = kwargs.get("attention_mask")
        self._refuse(kwargs, mask, rows, length)
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.long, device=x.device)
        placed = Rows.of(context.route, sizes, mask, rows, length).to(x.device)
        prompts = torch.cat([embed(owner) for owner, size in sizes.items() if size]).to(x.dtype)
        new: dict[str, Any] = {
            "input_ids": None,
            "inputs_embeds": placed.embeddings(x, prompts),
            "attention_mask": placed.spread(mask, 1, 0),
        }
        if kwargs.get("token_type_ids") is not None:
            new["token_type_ids"] = placed.spread(kwargs["token_type_ids"], 0, 0)
        given = self._positions(ids, kwargs.get("position_ids"))
        if given is not None:
            positions, nothing = given
            new["position_ids"] = placed.positions(positions.expand(rows, -1), nothing)
        context.grown = placed
        if context.batch is not None:
            context.batch = (rows, length + placed.longest)
        return {**kwargs, **new}

    def leave(self, context: Context, out: Any) -> Any:
        placed, context.grown = context.grown, None
        if placed is None or self.keeps:
            return out
        if context.batch is not None:
            context.batch = (context.batch[0], placed.length)
        if not isinstance(out, ModelOutput):
            return (placed.taken_out(out[0]), *out[1:])
        for name, value in out.items():
            if name == "last_hidden_state":
                out[name] = placed.taken_out(value)
            elif name == "hidden_states":
                out[name] = tuple(placed.taken_out(states) for states in value)
        return out

    def _embedding(self, ids: Tensor) -> Tensor:
        """The text's embeddings, with the owners' edits of the embedding layer."""
        assert isinstance(self.stack, PreTrainedModel)
        embedded: Tensor = self.stack.get_input_embeddings()(ids)
        return embedded

    def _positions(self, ids: Tensor | None, given: Tensor | None) -> tuple[Tensor, int] | None:
        """The text's own positions and one for nothing; None where the stack counts from 0 by itself."""
        if given is not None:
            return given, 0
        embeddings = self.stack._modules.get("embeddings")
        count = getattr(type(embeddings), "create_position_ids_from_input_ids", None)
        if count is None or ids is None:
            return None
        padding = int(cast(Any, embeddings).padding_idx)  # RoBERTa counts past its padding
        return count(ids, padding), padding

    def _refuse(
        self, kwargs: Mapping[str, Any], mask: Tensor | None, rows: int, length: int
    ) -> None:
        if mask is not None and mask.dim() != 2:
            raise UnsupportedError(
                f"a prompt in an encoder needs an attention mask (rows, tokens); it is {tuple(mask.shape)}."
            )
        for name, value in kwargs.items():
            fits = isinstance(value, Tensor) and tuple(value.shape[:2]) == (rows, length)
            if fits and name not in _KNOWN:
                raise UnsupportedError(
                    f"a prompt lengthens the encoder's rows, and what its input {name!r} should be for a prompt is not "
                    "known to Trimtab."
                )


@final
class DecoderGrowth(Growth):
    """A decoder whose attention cannot be reached: prompts enter its cache like text, at the first fill.

    What the cache holds then is remembered with it, so that later masks and positions tell of the prompts too.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.first = EncoderGrowth(stack, keeps=False)
        self.takes = frozenset(inspect.signature(stack.forward).parameters)

    def enter(
        self, context: Context, sizes: Mapping[Owner, int], embed: Embed, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        filled = context.memory.get(_FILLED)
        x = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if "position_ids" in self.takes and kwargs.get("position_ids") is None:
            seen = 0 if filled is None else filled.texts
            here = torch.arange(seen, seen + x.shape[1], device=x.device)
            kwargs = {**kwargs, "position_ids": here[None].expand(x.shape[0], -1)}
        if filled is not None:
            return filled.goes_on(x, kwargs)
        new = self.first.enter(context, sizes, embed, kwargs)
        placed = context.grown
        assert placed is not None
        context.memory[_FILLED] = Filled(new["attention_mask"], placed.size, placed.length)
        return new

    def leave(self, context: Context, out: Any) -> Any:
        return self.first.leave(context, out)


_FILLED = ("prompt", "filled")


@dataclass(slots=True)
class Filled:
    """What a cache holds: its mask (B, S), how long each row's prompt is (B, 1), and how many tokens of text."""

    mask: Tensor
    size: Tensor
    texts: int

    def goes_on(self, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a later fill."""
        rows, length = x.shape[:2]
        given = kwargs.get("attention_mask")
        fresh = self.mask.new_ones(rows, length) if given is None else given[:, -length:]
        self.mask = torch.cat([self.mask, fresh.to(self.mask)], dim=1)
        self.texts += length
        new = {**kwargs, "attention_mask": self.mask}
        if kwargs.get("position_ids") is not None:
            new["position_ids"] = kwargs["position_ids"] + self.size
        return new
