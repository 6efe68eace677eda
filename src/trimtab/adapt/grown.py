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
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from trimtab.adapt.context import Context
from trimtab.adapt.route import Owner, Route
from trimtab.errors import RouteError, UnsupportedError

_POOLED = ("ForSequenceClassification", "ForMultipleChoice")
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"}
Embed = Callable[[Owner], Tensor]
"""The prompt of an owner, (n, D)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where everything lies: all (B, 1) but ``length``, the T of the text, and ``longest``."""

    start: Tensor
    size: Tensor
    offset: Tensor
    length: int
    longest: int

    @classmethod
    def of(
        cls,
        route: Route,
        sizes: Mapping[Owner, int],
        mask_BT: Tensor | None,
        rows: int,
        length: int,
    ) -> Rows:
        if route.spans is not None:
            raise RouteError(
                "a prompt in an encoder lengthens its row, so documents cannot be packed there; send padded batches, "
                "one document per row."
            )
        owners = route.owners * rows if route.every else route.owners
        offsets = dict(zip(sizes, _sums(sizes.values()), strict=True))
        size, offset = (
            torch.tensor([[table[owner]] for owner in owners]) for table in (sizes, offsets)
        )
        if mask_BT is None:
            return cls(torch.zeros_like(size), size, offset, length, max(sizes.values()))
        start = (mask_BT.cumsum(1) == 0).sum(1, keepdim=True)
        device = mask_BT.device
        return cls(start, size.to(device), offset.to(device), length, max(sizes.values()))

    def to(self, device: torch.device) -> Rows:
        start, size, offset = (t.to(device) for t in (self.start, self.size, self.offset))
        return Rows(start, size, offset, self.length, self.longest)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L): the text's own index of each place, that of the prompt, and which of the two it is (0, 1; 2 none)."""
        place = torch.arange(self.length + self.longest, device=self.start.device)[None]
        in_prompt = (place >= self.start) & (place < self.start + self.size)
        text = torch.where(place < self.start, place, place - self.size)
        text = text.clamp(0, self.length - 1)
        kind = in_prompt.long()
        kind = torch.where(place >= self.length + self.size, 2, kind)
        return text, place - self.start, kind

    def spread(self, text_BT: Tensor, prompt: float, nothing: float) -> Tensor:
        """(B, L): a value per token of the text, with one for prompts and one for the places of nothing."""
        text, _, kind = self.parts()
        values = text_BT.gather(1, text)
        return values.masked_fill(kind == 1, prompt).masked_fill(kind == 2, nothing)

    def embeddings(self, text_BTD: Tensor, prompts_ND: Tensor) -> Tensor:
        """(B, L, D)."""
        text, prompt, kind = self.parts()
        count = text_BTD.shape[0] * self.length
        row = torch.arange(len(text), device=text.device)[:, None] * self.length
        index = torch.where(kind == 1, count + self.offset + prompt, row + text)
        index = torch.where(kind == 2, count + len(prompts_ND), index)
        table = [text_BTD.flatten(0, 1), prompts_ND, prompts_ND.new_zeros(1, prompts_ND.shape[1])]
        return torch.cat(table)[index]

    def positions(self, text_BT: Tensor, nothing: int) -> Tensor:
        """(B, L): the prompt takes the places of the first tokens, and these move on."""
        text, prompt, kind = self.parts()
        values = text_BT.gather(1, text)
        values = values + self.size * (text >= self.start)
        first = text_BT.gather(1, self.start.clamp_max(self.length - 1))
        return torch.where(kind == 1, first + prompt, values).masked_fill(kind == 2, nothing)

    def taken_out(self, grown: Tensor) -> Tensor:
        """(B, T, …) of (B, L, …)."""
        place = torch.arange(self.length, device=grown.device)[None]
        index = torch.where(place < self.start, place, place + self.size)
        return grown[torch.arange(len(index), device=grown.device)[:, None], index]


class Growth(ABC):
    """What happens to one stack's inputs and output. Abstract; both kinds are final."""

    @staticmethod
    def of(root: nn.Module, stack: nn.Module, encoder_decoder: bool) -> Growth | None:
        """What a stack needs; None for one that is no part of a transformers model."""
        if not isinstance(root, PreTrainedModel):
            return None
        if encoder_decoder and stack is root.get_decoder():
            return CrossGrowth()
        return EncoderGrowth(root, stack, encoder_decoder)

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
    """An encoder."""

    def __init__(self, root: PreTrainedModel, stack: nn.Module, encoder_decoder: bool) -> None:
        self.names = tuple(inspect.signature(stack.forward).parameters)
        self.stack = stack
        self.keeps = encoder_decoder or type(root).__name__.endswith(_POOLED)

    def enter(
        self, context: Context, sizes: Mapping[Owner, int], embed: Embed, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        ids, x = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if x is None:
            x = self._embedding(ids)
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
        padding = int(getattr(embeddings, "padding_idx"))  # noqa: B009 (RoBERTa counts past its padding)
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


def _sums(sizes: Any) -> list[int]:
    """Where each begins, side by side."""
    found, total = [], 0
    for size in sizes:
        found.append(total)
        total += size
    return found
