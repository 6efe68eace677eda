"""What the text of an answer has to be, as values: JSON by a schema, a regular expression, a grammar.

An answer that is asked for with one of these draws from the tokens alone that can still lead to such a text
(`trimtab.engine.guide`), whatever else is asked of it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from trimtab.engine import schemas
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.engine.vocabulary import Compilers


class Grammar(ABC):
    """The texts that an answer may be. A value: equal ones are compiled once."""

    @abstractmethod
    def compiled(self, compilers: Compilers) -> Any:
        """What xgrammar makes of it for one vocabulary; raises what xgrammar raises."""

    @abstractmethod
    def __str__(self) -> str:
        """As an error names it."""


@final
@dataclass(frozen=True, init=False)
class JsonSchema(Grammar):
    """JSON by a schema, in one line as `json.dumps` writes it, keys in the order of ``properties``.

    ``closed``: objects have the named properties only, where the schema does not say otherwise. What OpenAI calls
    ``json_object`` is ``JsonSchema({"type": "object"}, closed=False)``.

    Raises:
        ConfigError: no JSON, or a schema of which something could not be kept (see `trimtab.engine.schemas`).
    """

    text: str
    closed: bool

    def __init__(self, schema: Mapping[str, Any] | bool | str, *, closed: bool = True) -> None:
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"the schema is no JSON: {error}.") from None
        try:
            schemas.check(schema)
            text = json.dumps(schema)
        except RecursionError:
            raise ConfigError("the schema is nested too deeply.") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the schema is no JSON: {error}.") from None
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "closed", closed)

    def compiled(self, compilers: Compilers) -> Any:
        # With free whitespace a weak model may write nothing else until its tokens are used up.
        return compilers.json.compile_json_schema(
            self.text, any_whitespace=False, strict_mode=self.closed
        )

    def __str__(self) -> str:
        return f"the schema {_short(self.text)}"


@final
@dataclass(frozen=True)
class Regex(Grammar):
    """A regular expression, of the whole text."""

    pattern: str

    def compiled(self, compilers: Compilers) -> Any:
        return compilers.text.compile_regex(self.pattern)

    def __str__(self) -> str:
        return f"the regular expression {_short(self.pattern)}"


@final
@dataclass(frozen=True)
class Ebnf(Grammar):
    """A context-free grammar, in the notation of llama.cpp (GBNF); a text is a ``root``."""

    rules: str

    def compiled(self, compilers: Compilers) -> Any:
        return compilers.text.compile_grammar(self.rules)

    def __str__(self) -> str:
        return f"the grammar {_short(self.rules)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
