"""Schemas that could not be kept are refused where they are written, and so are grammars without their package."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.engine import kit
from trimtab.engine import Engine, SamplingParams
from trimtab.engine.grammars import Ebnf, Grammar, JsonSchema, Regex
from trimtab.errors import ConfigError, MissingPackageError

DEEP: Any = {"type": "null"}
for _ in range(3000):
    DEEP = {"type": "array", "items": DEEP}

BAD = [
    ('{"type":', "the schema is no JSON: .*char 8"),
    (DEEP, "nested too deeply"),
    ({"const": {1, 2}}, "the schema is no JSON"),
    (3, "schema: a schema is an object or a boolean, not 3"),
    ({"type": "strin"}, "type 'strin' is no type. Did you mean 'string'"),
    ({"type": []}, "is no type"),
    ({"minLength": 3}, "'minLength' cannot be kept without a type"),
    ({"type": "integer", "minLength": 3}, "'minLength' cannot be kept for integer"),
    ({"type": "number", "multipleOf": 3}, "'multipleOf' cannot be kept for number"),
    ({"type": "integer", "multipleOf": 3, "minimum": 3}, "of integers without bounds"),
    (
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        "schema/properties/a: 'uniqueItems' cannot be kept for array",
    ),
    (
        {"$defs": {"x": {"anyOf": [{"not": {}}]}}},
        r"schema/\$defs/x/anyOf/0: 'not' cannot be kept",
    ),
    ({"type": "object", "properties": 3}, "schema/properties: an object is needed"),
    ({"type": "object", "required": ["a"]}, "'a' is required and not one of the properties"),
    ({"type": "object", "properties": {'a"': True}}, "property 'a\"' cannot be kept"),
    ({"type": "array", "prefixItems": [{"type": "x"}]}, "schema/prefixItems/0: type 'x'"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "'pattern' cannot be kept together"),
    ({"type": "string", "pattern": "(?=a)b"}, "'\\(\\?=' in it"),
    ({"type": "string", "pattern": r"(a)\1"}, "pattern"),
    ({"type": "string", "pattern": r"\bfoo"}, "pattern"),
    ({"type": "string", "pattern": 'say "x"'}, "pattern"),
    ({"type": "string", "format": "ipv4"}, "format 'ipv4' cannot be kept; known: date"),
    ({"$ref": "http://x/y"}, "is not in this schema"),
    ({"$ref": "#/$defs/n", "type": "string"}, r"'type' cannot be kept beside '\$ref'"),
    ({"anyOf": [True], "type": "string"}, "'type' cannot be kept beside 'anyOf'"),
    ({"anyOf": []}, "schema/anyOf: a list of schemas"),
    ({"allOf": [True, True]}, "several schemas at once"),
    ({"oneOf": [{"type": "null"}]}, "'oneOf' cannot be kept"),
    ({"type": "string", "enum": ["a", 3]}, "3 is not of type string"),
    ({"type": "integer", "const": True}, "True is not of type integer"),
    ({"enum": "abc"}, "a list of values is needed"),
]


@pytest.mark.parametrize(("schema", "said"), BAD, ids=[said for _, said in BAD])
def test_what_could_not_be_kept_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        JsonSchema(schema)


def test_grammars_are_values() -> None:
    schema = {"title": "A", "type": "string", "enum": ["b", "a"]}
    assert JsonSchema(schema) == JsonSchema('{"title":"A","type":"string","enum":["b","a"]}')
    assert len({JsonSchema(schema), JsonSchema(schema, closed=False), Regex("a"), Ebnf("a")}) == 4
    params = SamplingParams(grammar=Regex("a"))
    assert params == SamplingParams(grammar=Regex("a")) != SamplingParams()
    with pytest.raises(ConfigError, match="grammar: Input should be an instance of Grammar"):
        SamplingParams(grammar=schema)


@pytest.mark.parametrize("grammar", [JsonSchema(True), Regex("a"), Ebnf('root ::= "a"')], ids=str)
def test_without_its_package(grammar: Grammar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    engine = Engine(kit.base())
    params = SamplingParams(max_tokens=4, grammar=grammar)
    for ask in (
        lambda: engine.sample([[5]], params),
        lambda: engine.requests([[5]], params),
        lambda: engine.stream([5], params),
    ):
        with pytest.raises(MissingPackageError, match=r"pip install 'trimtab\[constrained\]'"):
            ask()
    assert engine.sample([[5]], params.replace(grammar=None))
