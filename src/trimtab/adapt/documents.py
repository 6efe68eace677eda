"""What attention is told of the texts in its rows, so that it keeps them apart without a mask.

A model hands unknown keywords on to its attention. By them it is told of packed documents (`Documents`), or of keys and
values that lie in pages (`trimtab.adapt.pages`). Inside `apart` its own masks are left out.

Shapes: B rows, T tokens of a row, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.adapt.pages import Pages

DOCUMENTS = "trimtab_documents"
"""Where a model is told of packed documents (`Documents`)."""
PAGES = "trimtab_pages"
"""Where a model is told of keys and values in pages (`Pages`)."""


@dataclass(frozen=True, slots=True)
class Documents:
    """``ends`` are the places where the documents of the flattened (B · T) tokens end, none of them across a row.

    Where each row is one and padding, ``lengths`` are their own. What is made of them for a device is made once, for
    all layers.
    """

    ends: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    _starts: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _masks: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        return max(end - start for start, end in zip((0, *self.ends), self.ends, strict=False))

    @property
    def masked(self) -> bool:
        """Whether some attention needed a mask."""
        return bool(self._masks)

    def within(self, start: int, stop: int, rows: slice) -> Documents:
        """Those from one place to another among the flattened tokens, which lie in these rows."""
        ends = tuple(end - start for end in self.ends if start < end <= stop)
        return Documents(ends, None if self.lengths is None else self.lengths[rows])

    def starts(self, device: torch.device) -> Tensor:
        """(N + 1,) int32: where each begins, and the end."""
        if device not in self._starts:
            self._starts[device] = torch.tensor((0, *self.ends), dtype=torch.int32, device=device)
        return self._starts[device]

    def mask(self, rows: int, length: int, device: torch.device, causal: bool) -> Tensor:
        """(B, 1, T, T), true where a token is seen: those of the same document, if ``causal`` up to oneself."""
        what = rows, length, device, causal
        if what not in self._masks:
            self._masks[what] = self._mask(*what)
        return self._masks[what]

    def _mask(self, rows: int, length: int, device: torch.device, causal: bool) -> Tensor:
        sizes = torch.tensor(self.ends).diff(prepend=torch.zeros(1, dtype=torch.long))
        which = torch.arange(len(self.ends)).repeat_interleave(sizes).view(rows, length).to(device)
        same = which[:, :, None] == which[:, None]
        return (same.tril() if causal else same)[:, None]


_apart: ContextVar[Documents | Pages | None] = ContextVar("_apart", default=None)


@contextmanager
def apart(documents: Documents | Pages | None) -> Iterator[None]:
    """Inside, a model that is told of these documents makes no mask to keep them apart: our attention does it."""
    before = _apart.set(documents)
    try:
        yield
    finally:
        _apart.reset(before)


def told() -> Documents | Pages | None:
    """What attention is told of in this forward. (Dynamo cannot read a ContextVar.)"""
    return None if torch.compiler.is_compiling() else _apart.get()
