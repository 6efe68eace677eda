"""Patterns on the ends of paths, by which a site has a rank, or another option, of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.errors import ConfigError


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of ``path``, on whole segments."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    return default


def exactly(path: str, paths: Iterable[str]) -> str:
    """A pattern for this path alone: patterns match the ends of paths, unless they begin with ^."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path
