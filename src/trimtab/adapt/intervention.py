"""Interventions on hidden states at chosen positions of the prompt, shared by the methods of ReFT
(Wu et al. 2024, arXiv 2404.03592).

    h' = h + Bᵀ( W h + b − B h )   at the first ``first`` and the last ``last`` positions of the prompt

B spans a subspace, and what lies there is replaced by W h + b; dropout acts on the change.

Each of the two ends has tensors of its own, unless ``tied``. In a prompt that is too short for both, a position
belongs to the end that is nearer. Positions that are generated later pass untouched, so decoding costs nothing.
Padding does not count, and in a packed row each document has its own prompt.

Shapes: C is the width, R the rank; basis_RC is B, source_RC is W, and b_R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.adapt.at import PromptRanks
from trimtab.adapt.contract import At, Init, Layer, Method, Params, Place, Spec, kaiming_uniform
from trimtab.adapt.mlp import width_of
from trimtab.errors import UnsupportedError
from trimtab.kernels.dropout import drawn_masks
from trimtab.models.anatomy import Anatomy

FIRST, LAST, BOTH = "first", "last", "both"
SHORT = ("basis", "source", "b")


class Intervention(Method):
    """Fields, places, positions and the change; a method says what B is."""

    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = (
        "it acts at chosen positions of the prompt, and a weight acts at every position"
    )
    needs_prompt: ClassVar[bool] = True
    lr: ClassVar[float] = 9e-4
    short_names: ClassVar[Mapping[str, str]] = {
        f"reft_{end}_{short}": f"{end}.{short}" for end in (FIRST, LAST, BOTH) for short in SHORT
    }
    basis_init: ClassVar[tuple[Init]] = (kaiming_uniform,)
    basis_cast: ClassVar[bool] = True

    targets: str | tuple[str, ...] = "blocks"
    rank: int = Field(default=8, ge=1)
    """Dimensions of the subspace."""
    first: int = Field(default=7, ge=0)
    """How many positions at the start of the prompt."""
    last: int = Field(default=7, ge=0)
    """How many positions at its end."""
    tied: bool = False
    """The same tensors for both ends."""
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Of the change, in training."""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not self.first + self.last:
            raise ValueError("first and last are both 0, so it acts nowhere")
        return self

    @property
    def ends(self) -> list[str]:
        """The ends that have tensors of their own."""
        if self.tied:
            return [BOTH]
        return [end for end, count in ((FIRST, self.first), (LAST, self.last)) if count]

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        places = super().place(anatomy)
        if any(place.path in anatomy.experts for place in places):
            raise UnsupportedError(
                f"{self.kind}: an expert sees its own tokens only, so none is the first or the last of a prompt; "
                "target whole blocks or feed-forwards."
            )
        if not anatomy.encoder_decoder:
            return places
        reading = [place for place in places if "decoder" not in place.path.split(".")]
        if not reading or (self.targets != "blocks" and len(reading) < len(places)):
            raise UnsupportedError(
                f"{self.kind}: the prompt of an encoder-decoder model is read by its encoder; target blocks there."
            )
        return reading

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if layer.kind == "conv":
            raise UnsupportedError(f"{self.kind}: a convolution has no positions of a prompt.")
        width = width_of(layer)
        specs: dict[str, Spec] = {}
        for end in self.ends:
            for short in SHORT:
                shape = (self.rank,) if short == "b" else (self.rank, width)
                init = self.basis_init[0] if short == "basis" else _linear(width)
                cast = self.basis_cast or short != "basis"
                specs[f"{end}.{short}"] = Spec(f"reft_{end}_{short}", shape, init, cast)
        return specs

    def subspace(self, basis: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows that span the subspace, from the trained ones."""
        return basis.to(dtype)

    def change(self, p: Params, h: Tensor) -> Tensor:
        """What is added to h_..C; ``p`` are the tensors of one end."""
        basis = self.subspace(p["basis"], h.dtype)
        return F.linear(h, p["source"] - basis, p["b"]) @ basis

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        ranks = at.prompt_ranks(y)
        if ranks is None:
            return y
        flat = out = y.flatten(0, -2)
        for end, (index, real) in self._positions(ranks):
            change = self.change(of_end(p, end), flat[index])
            if self.dropout and at.training:
                change = change * self._masks(change, ranks.unit_count, at)
            out = out.index_add(0, index, change.to(y.dtype) * real)
        return out.view_as(y)

    def _masks(self, change: Tensor, units: int, at: At) -> Tensor:
        """Dropout's, drawn unit by unit."""
        draw, each = at.generator(change.device), change.view(units, -1, change.shape[-1])
        return at.per_unit(lambda n: drawn_masks(each[:n], self.dropout, draw)).view(change.shape)

    def _positions(self, ranks: PromptRanks) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """For each end, its positions unit by unit, and 1 or 0 for whether each exists."""
        start, stop = ranks.from_start, ranks.from_end
        head = (start >= 0) & (start < self.first)
        tail = (stop >= 0) & (stop < self.last)
        both = head & tail
        head, tail = head & ~(both & (start >= stop)), tail & ~(both & (start < stop))
        for end, mask, rank, count in (
            (FIRST, head, start, self.first),
            (LAST, tail, stop, self.last),
        ):
            if count:
                total = ranks.unit_count * count
                slot = torch.where(mask, ranks.units * count + rank, total)
                index = slot.new_zeros(total + 1).scatter(
                    0, slot, torch.arange(slot.shape[0], device=slot.device)
                )
                real = slot.new_zeros(total + 1).scatter(0, slot, 1)
                yield BOTH if self.tied else end, (index[:total], real[:total, None])

    # -- arithmetic: every kind is h + Bᵀ(…), so in a sum the ranks are concatenated --------------

    def same_positions(self, parts: Sequence[tuple[Method, Params]]) -> None:
        """Raise `UnsupportedError` where the parts act at different positions."""
        places = {(m.first, m.last, m.tied) for m, _ in parts if isinstance(m, Intervention)}
        if len(places) > 1:
            raise UnsupportedError(
                f"{self.kind}: the parts act at different positions of the prompt."
            )

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        result = dict(p)
        for end in self.ends:
            one = of_end(p, end)
            basis = self.subspace(one["basis"], one["source"].dtype)
            result[f"{end}.source"] = weight * one["source"] + (1 - weight) * basis
            result[f"{end}.b"] = weight * one["b"]
        return result

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        self.same_positions(parts)
        joined = {short: torch.cat([p[short] for _, p in parts]) for short in parts[0][1]}
        return self.replace(rank=joined[f"{self.ends[0]}.b"].shape[0]), joined


def of_end(p: Params, end: str) -> dict[str, Tensor]:
    """The tensors of one end, by the names basis, source and b."""
    return {short: p[f"{end}.{short}"] for short in SHORT}


def _linear(width: int) -> Init:
    """U(±1/√width), for a weight and its bias: what ``nn.Linear`` starts from."""
    return lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * width**-0.5
