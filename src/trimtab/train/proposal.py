"""Settings with which a run fits, in the order of least harm.

First what changes no result: blocks that are computed again (gradient checkpointing), then smaller micro-batches. Then
the base in four bits, which changes it a little. Last shorter examples, which are other data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.models.load import load_hollow
from trimtab.train.devices import Device
from trimtab.train.footprint import Footprint, footprint
from trimtab.train.recipe import Recipe

LEAST = 64
"""Tokens below which neither micro-batches nor examples are cut."""
Changes = dict[str, Any]


@dataclass(frozen=True)
class Proposal:
    """``overrides`` can be given to the commands as they are; ``peak`` is what the run then needs, in bytes."""

    overrides: tuple[str, ...]
    peak: int


def proposed(recipe: Recipe, device: Device, now: Footprint) -> Proposal | None:
    """The first settings that fit ``device``; None where none do. ``now`` is the footprint of the recipe."""
    return _Search(recipe, device, now).first()


class _Search:
    def __init__(self, recipe: Recipe, device: Device, now: Footprint) -> None:
        self.recipe, self.device, self.now = recipe, device, now
        self.room = device.memory or 0
        self._known: dict[tuple[tuple[str, Any], ...], int | None] = {}

    def first(self) -> Proposal | None:
        if self.device.libraries + self._weights() > self.room:
            return None
        changes: Changes = {}
        for change in self._kinds():
            changes = changes | change
            found = self._fitting(changes) or self._smaller(changes, self.now.longest)
            if found is not None:
                return found
        return self._shorter(changes)

    def _weights(self) -> int:
        """Bytes of the base alone, in as few bits as is proposed."""
        recipe = self.recipe
        base = load_hollow(
            recipe.model,
            dtype=recipe.dtype,
            task=recipe.task,
            storage=recipe.storage or "nf4",
            exempt=recipe.exempt,
            average_bits=recipe.average_bits,
        )
        return sum(t.nbytes for t in (*base.model.parameters(), *base.model.buffers()))

    def _kinds(self) -> list[Changes]:
        kinds: list[Changes] = [{}]
        if self.recipe.memory.recompute != "blocks":
            kinds = [{"memory.recompute": "blocks"}]
        if self.recipe.storage is None and self._needs({"storage": "nf4"}) is not None:
            kinds.append({"storage": "nf4"})
        return kinds

    def _smaller(self, changes: Changes, longest: int) -> Proposal | None:
        """The largest micro-batch that fits; none is smaller than an example."""
        sizes = [self.recipe.batch.micro_tokens // 2]
        while sizes[-1] // 2 >= max(longest, LEAST):
            sizes.append(sizes[-1] // 2)
        sizes = [size for size in sizes if size >= max(longest, LEAST)]
        if not sizes or self._fitting({**changes, "batch.micro_tokens": sizes[-1]}) is None:
            return None
        found = (self._fitting({**changes, "batch.micro_tokens": size}) for size in sizes)
        return next((one for one in found if one is not None), None)

    def _shorter(self, changes: Changes) -> Proposal | None:
        tokens = 1 << (self.now.longest - 1).bit_length() - 1
        while tokens >= LEAST:
            cut: Changes = {"data.max_tokens": tokens}
            if self.recipe.data.too_long == "error":
                cut["data.too_long"] = "right"
            micro = min(self.recipe.batch.micro_tokens, tokens)
            found = self._fitting({**changes, **cut, "batch.micro_tokens": micro})
            if found is not None:
                return found
            tokens //= 2
        return None

    def _fitting(self, changes: Changes) -> Proposal | None:
        peak = self._needs(changes) if changes else None
        if peak is None or peak > self.room:
            return None
        return Proposal(tuple(_override(key, value) for key, value in changes.items()), peak)

    def _needs(self, changes: Changes) -> int | None:
        """Bytes with these changes; None where they cannot be."""
        key = tuple(sorted(changes.items()))
        if key not in self._known:
            try:
                self._known[key] = footprint(changed(self.recipe, changes), self.device).needs(
                    self.device
                )
            except TrimtabError:
                self._known[key] = None
        return self._known[key]


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with options by dotted name."""
    for key, value in changes.items():
        group, dot, name = key.partition(".")
        if dot:
            inner = {"memory": recipe.memory, "batch": recipe.batch, "data": recipe.data}[group]
            recipe = recipe.replace(**{group: inner.replace(**{name: value})})
        else:
            recipe = recipe.replace(**{key: value})
    return recipe


def _override(key: str, value: object) -> str:
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
