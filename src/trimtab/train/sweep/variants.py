"""Variants as recipes: each is made and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from trimtab.adapt.parse import method_from
from trimtab.errors import ConfigError
from trimtab.train.recipe import DataRecipe, Recipe
from trimtab.train.recipe_file import make_recipe
from trimtab.train.sources import with_labels
from trimtab.train.sweep.space import Choice, Space
from trimtab.train.trackers import trackers

VARIANTS = "variants"
_BASE = "it is of the base, of which there is one copy; make a sweep for each"
_ENGINE = "it is of the engine that computes all variants at once; set it for all"
_SAME = "variants are measured alike, so that they can be compared; set it for all"
_OURS = "a sweep names its variants and their folders itself"
ALIKE: Mapping[str, str] = {
    "model": _BASE, "task": _BASE, "dtype": _BASE, "storage": _BASE, "exempt": _BASE, "average_bits": _BASE,
    "device": _BASE, "memory": _ENGINE, "batch.micro_tokens": _ENGINE, "data.held_out": _SAME,
    "data.fraction": _SAME, "eval": _SAME, "checkpoint": _SAME, "track": _SAME, "out": _OURS, "name": _OURS,
}  # fmt: skip
"""Options that do not vary, and why."""


@dataclass(frozen=True)
class Variant:
    """The recipe that a choice makes, with a name and a folder of its own."""

    number: int
    choice: Choice
    recipe: Recipe

    @property
    def label(self) -> str:
        """Its choice, as it is typed."""
        return label_of(self.choice)

    @property
    def folder(self) -> Path:
        return Path(str(self.recipe.out))


def label_of(choice: Choice) -> str:
    """A choice as it is typed."""
    return " ".join(f"{key}={shown(value)}" for key, value in choice.items())


def shown(value: Any) -> str:
    """A value in few characters."""
    return f"{value:g}" if isinstance(value, float) else str(value)


class Variants:
    """Makes them, and knows those that were made.

    Args:
        values: the recipe's options, not yet validated; ``where`` names their source in errors.
        folder: the sweep's.
    """

    def __init__(self, values: Mapping[str, Any], space: Space, folder: Path, where: str) -> None:
        self._values, self._space, self._folder, self._where = values, space, folder, where
        self.made: list[Variant] = []
        self._recipes: list[Recipe] = []

    def another(self) -> Variants:
        """One that has made none so far."""
        return Variants(self._values, self._space, self._folder, self._where)

    def make(self, choices: Sequence[Choice]) -> list[Variant]:
        """The variants of these choices.

        Raises:
            ConfigError: an option that no variant has, a value that does not fit, options that cannot vary, or two
                variants that are the same; `UnknownNameError` suggests near names.
        """
        first = len(self.made)
        for choice in choices:
            self.made.append(self._variant(choice))
        return self.made[first:]

    def _variant(self, choice: Choice) -> Variant:
        number, label = len(self._recipes), label_of(choice)
        recipe = make_recipe(self._values, self._space.values(choice), where=self._where)
        try:
            method = method_from(recipe.method).to_dict()
        except ConfigError as error:
            raise type(error)(f"variant {label}: {error}") from error
        whole = recipe.replace(method=method, out=None)
        for known, other in zip(self._recipes, self.made, strict=True):
            if whole == known:
                raise ConfigError(f"the variants {other.label} and {label} are the same run.")
        if self._recipes:
            _check_alike(self._recipes[0], whole)
        else:
            _check_judged(recipe)
        self._recipes.append(whole)
        folder = self._folder / VARIANTS / f"{number:03d}"
        named = recipe.replace(name=f"{recipe.name}-{number:03d}", out=str(folder))
        return Variant(number, choice, named)


def labelled(variants: Sequence[Variant]) -> list[Variant]:
    """The variants of classifiers with the labels that their data have, which are one set.

    Raises:
        ConfigError: other labels in other data.
    """
    known: dict[str, DataRecipe] = {}
    found = []
    for variant in variants:
        recipe = variant.recipe
        key = recipe.data.model_dump_json()
        if key not in known:
            known[key] = with_labels(recipe).data
        found.append(replace(variant, recipe=recipe.replace(data=known[key])))
    if len({data.labels for data in known.values()}) > 1 and found[0].recipe.task != "causal-lm":
        raise ConfigError(
            "the variants' data have different labels, and the base has one set of them; name them all in data.labels."
        )
    return found


def _check_alike(first: Recipe, other: Recipe) -> None:
    one, two = first.model_dump(), other.model_dump()
    for key, reason in ALIKE.items():
        path = key.split(".")
        if reduce(dict.__getitem__, path, one) != reduce(dict.__getitem__, path, two):
            raise ConfigError(f"a sweep cannot vary {key}: {reason}.")


def _check_judged(recipe: Recipe) -> None:
    if recipe.data.held_out is None and not recipe.data.fraction:
        raise ConfigError(
            "a sweep judges its variants by their loss on held-out data; set data.held_out or data.fraction."
        )
    if recipe.memory.frozen == "cache":
        raise ConfigError(
            "memory.frozen keeps hidden states below one adapter, and a sweep trains many; leave it out."
        )
    for name in recipe.track:
        if not trackers.get(name).several:
            raise ConfigError(
                f"tracker {name!r} follows one run at a time, and a sweep is several; leave it out, or take another."
            )
