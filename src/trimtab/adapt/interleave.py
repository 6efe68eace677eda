"""Where prompts lie among the tokens of a batch whose rows they lengthen.

Shapes: B rows, T tokens of the text, N tokens of all prompts together, L = T + the longest prompt, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapt.route import Owner, Route
from trimtab.errors import RouteError


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


def _sums(sizes: Iterable[int]) -> list[int]:
    """Where each begins, side by side."""
    found, total = [], 0
    for size in sizes:
        found.append(total)
        total += size
    return found
