"""Strict frozen configuration values.

A `Config` is an immutable, validated value that lives beside what it configures. Unknown keys are
errors that suggest the nearest known one; nothing is coerced from a string that looks like a number.
No torch here: the command line validates a recipe before any heavy import. Where a value has options of its own, it may
be written as one text, ``name(option=literal)``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.errors import ConfigError, UnknownNameError, suggest

_FORM = re.compile(r"\s*([A-Za-z0-9_\-+]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


class Config(BaseModel):
    """Base of every configuration: frozen, strict about keys, comparable, hashable where fields are."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        arbitrary_types_allowed=False,
        use_attribute_docstrings=True,  # the text below a field is its description
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(type(self), error, title=type(self).__name__) from None

    # pydantic then validates nested configs without calling __init__, and reports their full path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Validate a mapping (from YAML or JSON); ``where`` names its source in errors."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise explain(cls, error, title=where or cls.__name__) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**dict(self), **changes})


def explain(model: type[BaseModel], error: ValidationError, *, title: str) -> ConfigError:
    """Turn pydantic's report into one error that says what, where and what to do."""
    lines: list[str] = []
    unknown_only = True
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        where = ".".join(path) or title
        if problem["type"] == "extra_forbidden":
            known = list(fields_at(model, path[:-1]))
            hint = suggest(path[-1], known) or f" Known: {', '.join(sorted(known))}."
            lines.append(f"unknown option {where!r}.{hint}")
        else:
            unknown_only = False
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
            lines.append(f"{where}: {message}{given}")
    text = f"{title}: " + "; ".join(lines)
    return UnknownNameError(text) if unknown_only else ConfigError(text)


def fields_at(model: type[BaseModel], path: Iterable[str]) -> Iterable[str]:
    """Names of the fields of the nested model at ``path`` (the outer ones if it cannot be followed)."""
    current: type[BaseModel] = model
    for part in path:
        field = current.model_fields.get(part)
        nested = field.annotation if field is not None else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            break
        current = nested
    return current.model_fields.keys()


def name_and_options(text: str, *, of: str) -> tuple[str, dict[str, Any]]:
    """What ``name`` or ``name(option=literal)`` says; ``of`` is what is written so.

    Raises:
        ConfigError: a text that cannot be read.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise ConfigError(
            f"{of} {text!r}: write a name and options, for example 'name(option=16)'."
        )
    try:
        call = ast.parse(f"f({form.group(2) or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("options are written name=value")
        return form.group(1), {str(k.arg): _literal(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{of} {text!r} cannot be read: {error}.") from None


def _literal(node: ast.expr) -> Any:
    """A Python literal; ``name``, ``name(...)`` and ``one|other`` stay text, which a field reads as a value."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Name):
        known = {"true": True, "false": False, "none": None, "null": None}
        return known.get(node.id.lower(), node.id)
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if called or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)):
        return ast.unparse(node)
    return ast.literal_eval(node)
