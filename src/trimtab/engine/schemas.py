"""Which JSON schemas can be kept to the letter.

xgrammar passes over keywords that it does not know or cannot join with others, or writes a warning somewhere. Here a
schema is refused where anything in it would not hold for every answer, with the place and the keyword:

- A schema says one thing: ``$ref``, ``const``, ``enum``, ``anyOf``, ``allOf`` of one, or ``type`` with that type's
  keywords (each has to go with a type). Annotations may stand everywhere.
- A ``pattern`` is of the whole string, without lookaround, backreferences and what JSON escapes; it stands alone. Names
  of properties are without what JSON escapes.
- ``format`` is about form: a date may be the 31st of June.
- Half a surrogate pair is one character to xgrammar, and three to those who decode bytes that are no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import ConfigError, suggest

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
TYPES: Mapping[str, tuple[type | tuple[type, ...], frozenset[str]]] = {
    "null": (type(None), frozenset()),
    "boolean": (bool, frozenset()),
    "string": (str, frozenset({"minLength", "maxLength", "pattern", "format"})),
    "integer": (int, BOUNDS | {"multipleOf"}),
    "number": ((int, float), BOUNDS),
    "array": (list, frozenset({"items", "prefixItems", "minItems", "maxItems"})),
    "object": (
        dict,
        frozenset({"properties", "required", "additionalProperties", "maxProperties"}),
    ),
}
"""JSON's types: what they are here, and their keywords."""
FORMATS = frozenset({"date", "time", "date-time", "duration", "email", "hostname", "uuid"})
ALONE = ("$ref", "const", "enum", "anyOf", "allOf")
ESCAPES = re.compile(r"\\[dDwWsS.\-\[\](){}+*?^$|/]")
"""What a backslash may stand before in a pattern."""
ESCAPED = re.compile(r"""["\\\x00-\x1f]""")
"""What JSON has to escape in a string."""
OUTSIDE = re.compile(ESCAPED.pattern + r"|\(\?(?!:)")
"""What a pattern may not have otherwise: JSON would escape it, or it looks around."""


def check(schema: Any, at: str = "schema") -> None:
    """Raise `ConfigError` where something in a schema could not be kept; ``at`` is its place."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{at}: a schema is an object or a boolean, not {schema!r}.")
    for group in ("$defs", "definitions"):
        for name, inner in _mapping(schema, group, at).items():
            check(inner, f"{at}/{group}/{name}")
    said = [key for key in schema if key not in ANNOTATIONS]
    alone = next((key for key in ALONE if key in schema), None)
    if alone is None:
        _check_typed(schema, said, at)
        return
    beside = {alone, "type"} if alone in ("const", "enum") else {alone}
    _check_known(said, beside, at, f"beside {alone!r}")
    match alone:
        case "$ref":
            if not str(schema["$ref"]).startswith("#"):
                raise ConfigError(f"{at}: $ref {schema['$ref']!r} is not in this schema.")
        case "const":
            _check_values(schema, [schema["const"]], at)
        case "enum":
            _check_values(schema, schema["enum"], at)
        case _:
            inner = schema[alone]
            if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
                raise ConfigError(f"{at}/{alone}: a list of schemas is needed, not {inner!r}.")
            if alone == "allOf" and len(inner) > 1:
                raise ConfigError(f"{at}/allOf: several schemas at once cannot be kept.")
            for number, one in enumerate(inner):
                check(one, f"{at}/{alone}/{number}")


def _check_typed(schema: Mapping[str, Any], said: Sequence[str], at: str) -> None:
    types = _types(schema, at)
    known = {"type"}.union(*(TYPES[name][1] for name in types))
    _check_known(said, known, at, f"for {' or '.join(types)}" if types else "without a type")
    if "multipleOf" in schema and ("number" in types or not BOUNDS.isdisjoint(schema)):
        raise ConfigError(f"{at}: 'multipleOf' can be kept of integers without bounds alone.")
    _check_string(schema, at)
    properties = _mapping(schema, "properties", at)
    missing = [key for key in schema.get("required", ()) if key not in properties]
    if missing:
        raise ConfigError(f"{at}: {missing[0]!r} is required and not one of the properties.")
    for name, inner in properties.items():
        if ESCAPED.search(name):
            raise ConfigError(
                f"{at}: property {name!r} cannot be kept, for what JSON escapes in it."
            )
        check(inner, f"{at}/properties/{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            check(schema[key], f"{at}/{key}")
    for number, inner in enumerate(schema.get("prefixItems", ())):
        check(inner, f"{at}/prefixItems/{number}")


def _check_string(schema: Mapping[str, Any], at: str) -> None:
    ways = [key for key in ("pattern", "format") if key in schema]
    if len(ways) == 2 or (ways and ("minLength" in schema or "maxLength" in schema)):
        raise ConfigError(f"{at}: {ways[0]!r} cannot be kept together with what else is said.")
    if "format" in schema and schema["format"] not in FORMATS:
        raise ConfigError(
            f"{at}: format {schema['format']!r} cannot be kept; known: {', '.join(sorted(FORMATS))}."
        )
    rest = ESCAPES.sub("", str(schema.get("pattern", "")))
    if bad := OUTSIDE.search(rest):
        raise ConfigError(
            f"{at}: pattern {schema['pattern']!r} cannot be kept, for {rest[bad.start() : bad.start() + 3]!r} in it."
        )


def _check_known(said: Sequence[str], known: set[str], at: str, where: str) -> None:
    for key in said:
        if key not in known:
            hint = suggest(key, known)
            raise ConfigError(f"{at}: {key!r} cannot be kept {where}.{hint}")


def _check_values(schema: Mapping[str, Any], values: Any, at: str) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"{at}/enum: a list of values is needed, not {values!r}.")
    types = _types(schema, at)
    for value in values if types else ():
        if not any(_is(value, name) for name in types):
            raise ConfigError(f"{at}: {value!r} is not of type {' or '.join(types)}.")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name][0]) and (name == "boolean" or not isinstance(value, bool))


def _types(schema: Mapping[str, Any], at: str) -> list[str]:
    """The types that are named; none where anything goes."""
    if "type" not in schema:
        return []
    given = schema["type"]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not names:
        raise ConfigError(f"{at}: type {given!r} is no type.")
    for name in names:
        if name not in TYPES:
            raise ConfigError(f"{at}: type {name!r} is no type.{suggest(str(name), TYPES)}")
    return list(names)


def _mapping(schema: Mapping[str, Any], key: str, at: str) -> Mapping[str, Any]:
    found = schema.get(key, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"{at}/{key}: an object is needed, not {found!r}.")
    return found
