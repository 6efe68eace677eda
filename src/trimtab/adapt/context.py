"""The context of one forward: its route, its masks, its phase, and what gates remember.

A context is made by the bank when the model is called, read by sites, and captured where a block is
checkpointed, so that a recomputation in backward sees what the forward saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.adapt.route import Layout, Owner, Part, Route, layout
from trimtab.errors import RouteError

if TYPE_CHECKING:
    from trimtab.adapt.interleave import Rows
    from trimtab.adapt.lean import Lean
    from trimtab.adapt.pages import Pages

KeysValues = dict[str, tuple[Tensor, Tensor]]
"""Path of an attention -> its keys and values, (length, C) for all rows alike or (B, length, C)."""
NO_SEEDS: Mapping[str, int] = {}
IGNORED = -100
"""The label that transformers gives to positions without loss."""


class Context:
    """One forward of one model. Tensors are references to the caller's, never copies.

    Args:
        route: who acts, already expanded to the rows of this batch.
        rows: rows of the batch, or None outside a call of the whole model.
        mask: (B, T) attention mask, or None.
        prompt: (B, T) true where a gate may look (before the first trained token), or None.
        memory: where gates keep decisions that outlive this forward (a generation).
        ids: (B, T) the tokens, or None where the model was given none.
        decoding: whether the prompt lies in the cache already; told only where a method needs the prompt.
        pages: where keys and values lie, if they are not the model's to keep.
        seeds: of the random numbers that adapters draw in this forward, by name; others draw from torch's own.

    ``scratch`` carries tensors from one site to a later one of the same forward; who reads them takes them out.
    ``ready`` holds what methods made of their shared tensors; ``prompts`` the keys and values of the owners' prompts
    by attention; ``positions`` (B, T) those of the text, without what lies before it. ``caught`` is where attention
    leaves its keys and values when a prompt, and no text, is read; ``grown`` where an encoder's rows have theirs.
    """

    def __init__(
        self,
        route: Route,
        *,
        rows: int | None = None,
        length: int | None = None,
        mask: Tensor | None = None,
        prompt: Tensor | None = None,
        labels: Tensor | None = None,
        decoding: bool = False,
        training: bool = False,
        memory: dict[Any, Any] | None = None,
        past: Any = None,
        ids: Tensor | None = None,
        pages: Pages | None = None,
        seeds: Mapping[str, int] = NO_SEEDS,
    ) -> None:
        self.route = route
        self.seeds = seeds
        self.drawn: dict[tuple[str, str], int] = {}
        """How often an adapter has drawn at a path; kept by `generator`."""
        self.rows = rows
        self.batch = None if rows is None or length is None else (rows, length)
        self.mask = mask
        self.labels = labels
        self.training = training
        self.decoding = decoding
        self.memory: dict[Any, Any] = {} if memory is None else memory
        self.scratch: dict[Any, Any] = {}
        self.ranks: dict[Any, Any] = {}
        """Where positions stand in their prompts, by the shape of a part; kept by `At.prompt_ranks`."""
        self.ready: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self.prompts: dict[Owner, KeysValues] = {}
        self.positions: Tensor | None = None
        self.caught: KeysValues | None = None
        self.grown: Rows | None = None
        self.past = past
        self.ids = ids
        self.pages = pages
        self.acting: dict[Any, Tensor] = {}
        """Where adapters act that wait to be invoked; kept by `trimtab.adapt.invoked`."""
        self.stacked: dict[Any, Any] = {}
        """Which rows of a shape lie in which slots; kept by `trimtab.adapt.stack`."""
        self.losses: list[tuple[str, str, Tensor]] = []
        self.recomputing = False
        self.lean: Lean | None = None
        """What is changed in the model for this forward; so also where a part of it is recomputed."""
        self.again: dict[Any, Any] = {}
        """What gates have decided in this recomputation of a block."""
        self._prompt = prompt
        self._drops: dict[str, int] = {}
        self._only: Part | None = None
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def of_rows(self, index: Tensor) -> Context:
        """The context of a call with some rows alone, all of one owner; units stay those of the batch."""
        owners = self.route.owners
        count = int(index.max()) + 1 if self.route.every else len(owners)
        owner = owners[0] if self.route.every else owners[int(index[0])]
        own = Context(
            Route.everyone(owner),
            rows=len(index),
            length=None if self.batch is None else self.batch[1],
            mask=_rows(self.mask, index),
            prompt=_rows(self._prompt, index),
            labels=_rows(self.labels, index),
            decoding=self.decoding,
            training=self.training,
            memory=self.memory,
            past=self.past,
            ids=_rows(self.ids, index),
            seeds=self.seeds,
        )
        own.drawn = self.drawn
        own.losses = self.losses
        own._drops = self._drops
        own._only = Part(owner, None, index, False, count)
        return own

    def layout(self, x: Tensor) -> Layout:
        """The parts of a tensor of this shape; found once per shape, not per layer."""
        route = self.route
        if self._only is not None:
            return Layout((self._only,), (), None)
        if route.every:
            return Layout((Part(route.acting[0], None, None, False, x.shape[0]),), (), None)
        key = (x.dim(), *x.shape[:2])
        if key not in self._layouts:
            self._layouts[key] = layout(route, x, self.batch)
        return self._layouts[key]

    def for_each_row(self, ids: Tensor) -> Tensor:
        """Ids looked up once for the batch (positions), once a row where rows have different adapters."""
        route = self.route
        if self.rows is None or route.single is not None or route.spans is not None:
            return ids
        return ids.expand(self.rows, -1) if ids.dim() == 2 and ids.shape[0] == 1 else ids

    def visible(self, part: Part, y: Tensor, *, causal: bool) -> Tensor:
        """For each position of a part of the input embeddings (flattened), whether a gate may look at it.

        Raises:
            RouteError: a causal model in training, and nothing says where the prompt ends.
        """
        mask = self._given(causal)
        if mask is None:
            return torch.ones(y[..., 0].numel(), dtype=torch.bool, device=y.device)
        chosen = part.take(mask.to(y.device))
        if (
            chosen.dim() == 2 and y.dim() == 2 and chosen.shape[0] == y.shape[0]
        ):  # one position a row
            return torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
        chosen = chosen.flatten()
        if chosen.numel() != y[..., 0].numel():
            raise RouteError(
                f"the masks of this batch do not fit the embeddings of shape {tuple(y.shape)}."
            )
        return chosen

    def dropped(self, adapter: str, blocks: int) -> int:
        """How many of the first blocks an adapter leaves out of this forward of training; drawn once."""
        if adapter not in self._drops:
            own = self.generator(adapter, "", torch.device("cpu"))
            self._drops[adapter] = int(torch.randint(blocks, (), generator=own))
        return self._drops[adapter]

    def generator(self, adapter: str, path: str, device: torch.device) -> torch.Generator | None:
        """What an adapter draws from at a path: its own numbers where it has a seed, whoever else is in the batch; and
        torch's own (None) where it has none. Drawn from in the same order, it gives a recomputation the same."""
        seed = self.seeds.get(adapter)
        if seed is None or device.type == "meta":  # nothing is drawn there
            return None
        number = self.drawn[adapter, path] = self.drawn.get((adapter, path), 0) + 1
        digest = blake2b(f"{seed} {number} {path}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)

    @property
    def share(self) -> tuple[int, ...] | None:
        """The rows of the batch that this call is of, where it is not of all (`of_rows`)."""
        units = None if self._only is None else self._only.units
        return None if units is None else tuple(units.tolist())

    def rows_of(self, y: Tensor) -> int | None:
        """How many rows the flattened tokens y_NC are of; None where y is not such."""
        if self.batch is None or y.dim() != 2 or y.shape[0] != self.batch[0] * self.batch[1]:
            return None
        return self.batch[0]

    def _given(self, causal: bool) -> Tensor | None:
        """(B, T) true where a gate may look; None is everywhere."""
        mask = None if self.mask is None or self.mask.dim() != 2 else self.mask.to(torch.bool)
        if not causal:
            return mask
        prompt = self._prompt
        if prompt is None and self.labels is not None:
            # A token is visible until the first label; that label's own token is the answer.
            prompt = (self.labels != IGNORED).cumsum(1) == 0
        if prompt is None:
            if self.training:
                raise RouteError(
                    "a gate of a causal model may look at the prompt only, and nothing says where it ends: pass "
                    "labels (with -100 on the prompt) or train through trimtab."
                )
            return mask
        return prompt if mask is None else prompt & mask


def _rows(value: Tensor | None, index: Tensor) -> Tensor | None:
    return None if value is None else value[index.to(value.device)]
