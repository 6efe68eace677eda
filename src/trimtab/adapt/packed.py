"""Adapters in host memory, each as one piece: its values one after another, and a form that equal adapters share.

Attached, an adapter is hundreds of modules and parameters; as a value, a dictionary of as many tensors. A thousand of
them that wait to be used are a thousand pieces of bytes, and what says where in a piece each tensor lies is there once.

An adapter in training is packed as it is, with all that goes along with it (`Along`), and comes back bit for bit; what
the form of a copy to answer with is, `trimtab.adapt.fit` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter, Origin, SiteSpec, TensorName
from trimtab.adapt.contract import Method
from trimtab.adapt.fingerprint import Fingerprint

ALIGNED = 16
"""Every tensor of a piece begins at a multiple of so many bytes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors lie in a piece of bytes: for each its dtype, shape and first byte."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    begins: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, kinds: Iterable[tuple[torch.dtype, Sequence[int]]]) -> Layout:
        """The layout of tensors of these dtypes and shapes, one after another."""
        dtypes, shapes, begins, end = [], [], [], 0
        for dtype, shape in kinds:
            begins.append(-(-end // ALIGNED) * ALIGNED)
            dtypes.append(dtype)
            shapes.append(tuple(shape))
            end = begins[-1] + dtype.itemsize * torch.Size(shape).numel()
        return cls(tuple(dtypes), tuple(shapes), tuple(begins), end)

    @property
    def widened(self) -> int:
        """Bytes that the tensors take more as masters, which are in fp32 at least."""
        narrow = 0
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            if dtype.is_floating_point and dtype.itemsize < 4:
                narrow += (4 - dtype.itemsize) * torch.Size(shape).numel()
        return narrow

    def pack(self, tensors: Iterable[Tensor]) -> Tensor:
        """The tensors as one piece, cast to the dtypes of the layout."""
        piece = torch.empty(self.nbytes, dtype=torch.uint8)
        for view, tensor in zip(self.views(piece), tensors, strict=True):
            view.copy_(tensor.detach())
        return piece

    def views(self, piece: Tensor) -> list[Tensor]:
        """The tensors of a piece, which lie in its memory."""
        found = []
        for dtype, shape, begin in zip(self.dtypes, self.shapes, self.begins, strict=True):
            end = begin + dtype.itemsize * torch.Size(shape).numel()
            found.append(piece[begin:end].view(dtype).view(shape))
        return found


@dataclass(frozen=True, slots=True)
class Form:
    """All of an adapter but its name, its provenance and its values. Told apart by names and layout, mostly."""

    names: tuple[TensorName, ...]
    layout: Layout
    sites: tuple[SiteSpec, ...] = field(hash=False)
    method: Method = field(hash=False)
    base: Fingerprint | None = field(hash=False)
    origin: Origin = field(hash=False)
    drawn: Mapping[str, str] = field(hash=False)

    @classmethod
    def of(cls, adapter: Adapter, dtypes: Mapping[TensorName, torch.dtype] | None = None) -> Form:
        """The form of an adapter; ``dtypes`` are those of tensors that are not in their own."""
        dtypes = dtypes or {}
        named = adapter.named()
        return cls(
            tuple(named),
            Layout.of((dtypes.get(name, t.dtype), t.shape) for name, t in named.items()),
            adapter.sites,
            adapter.method,
            adapter.base,
            replace(adapter.origin, provenance={}),
            dict(adapter.drawn),
        )


class Along(NamedTuple):
    """What goes along with an adapter in training: more tensors, as one piece, and facts that JSON can hold."""

    names: tuple[str, ...]
    layout: Layout
    piece: Tensor
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Along:
        layout = Layout.of((t.dtype, t.shape) for t in tensors.values())
        return cls(tuple(tensors), layout, layout.pack(tensors.values()), facts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, in the memory of the piece."""
        return dict(zip(self.names, self.layout.views(self.piece), strict=True))


@dataclass(frozen=True, slots=True)
class Packed:
    """One adapter: its form and its values; ``along`` where it is in training."""

    form: Form
    piece: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)
    along: Along | None = None

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes + (0 if self.along is None else self.along.piece.nbytes)

    def adapter(self, name: str) -> Adapter:
        """The adapter by that name. Its tensors lie in the piece: who goes on to write them copies them first."""
        form = self.form
        values = dict(zip(form.names, form.layout.views(self.piece), strict=True))
        origin = replace(form.origin, provenance=dict(self.provenance))
        found = Adapter(name, form.method, form.sites, values, base=form.base, origin=origin)
        found.drawn = dict(form.drawn)
        return found
