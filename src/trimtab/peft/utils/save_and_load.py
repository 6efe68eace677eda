"""State dicts under the path by which PEFT's users import them; `trimtab.peft.state` makes them."""

from __future__ import annotations

from typing import Any

from trimtab.peft import state


def __getattr__(name: str) -> Any:
    try:
        return getattr(state, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
