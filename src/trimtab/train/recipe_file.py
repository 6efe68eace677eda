"""Recipes as YAML files, and dotted overrides. No torch here, unless a method is overridden by part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import ConfigError
from trimtab.train.recipe import DEFAULT_METHOD, Recipe


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``a.b=value`` overrides applied before it is validated.

    Raises:
        ConfigError: no such file, not YAML, or a value that does not fit; `UnknownNameError` with the
            nearest name for a key that does not exist, in the file or in an override.
    """
    return make_recipe(read_values(path), overrides, where=Path(path).name)


def read_values(path: Path | str) -> dict[str, Any]:
    """The options in a YAML file, not yet validated."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {str(path)!r}: {error}.") from error
    values = load_yaml(text, where=file.name)
    if not isinstance(values, dict):
        kind = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{file.name}: a recipe is a mapping of options; found {kind}.")
    return values


def make_recipe(
    values: Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    where: str = "recipe",
) -> Recipe:
    """A recipe from nested values, and overrides: texts ``a.b=value``, or values by dotted name."""
    merged: dict[str, Any] = {key: _copied(value) for key, value in values.items()}
    named = overrides if isinstance(overrides, Mapping) else dict(map(override, overrides))
    for key, value in named.items():
        _set(merged, key.split("."), value, key)
    return Recipe.parse(merged, where=where)


def override(text: str) -> tuple[str, Any]:
    """The dotted name and the value that ``a.b=value`` says."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: write option=value, for example optim.lr=1e-4.")
    return key.strip(), load_yaml(value, where=f"override {key.strip()}")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The whole recipe, defaults filled in."""
    path.write_text(recipe_text(recipe), encoding="utf-8")


def recipe_text(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults filled in."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_yaml(text: str, *, where: str) -> Any:
    """YAML 1.1 without its traps: ``1e-4`` is a number, and a repeated key is an error."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}.") from None


def _set(values: dict[str, Any], path: list[str], value: Any, whole: str) -> None:
    for place, segment in enumerate(path[:-1]):
        whole_method = path[: place + 1] == ["method"]
        inner = values.setdefault(segment, DEFAULT_METHOD if whole_method else {})
        if isinstance(inner, str) and whole_method:
            inner = values[segment] = _method_options(inner)
        if inner is None:
            inner = values[segment] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {whole!r}: {'.'.join(path[: place + 1])!r} is a value, not a group of options."
            )
        values = inner
    values[path[-1]] = value


def _method_options(text: str) -> dict[str, Any]:
    """``lora(rank=16)`` as the mapping whose parts can be overridden."""
    from trimtab.adapt.parse import method_from

    return method_from(text).to_dict(given=True)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} occurs twice", key_node.start_mark
            )
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
