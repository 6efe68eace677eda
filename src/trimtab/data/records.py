"""One line of JSON to one record, strictly: what does not fit is an error that names file and line.

Two shapes are known so far::

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}

A conversation is an optional system turn, then user and assistant in turns, the assistant last. An
assistant message may carry ``"weight"``, a number ≥ 0 that scales its loss (0: not trained).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from trimtab.data.source import Line
from trimtab.errors import DataError, suggest

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``weight`` scales the loss of an assistant's turn."""

    role: Role
    content: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A conversation that ends with the assistant."""

    messages: tuple[Message, ...]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """A prompt and what should follow it."""

    prompt: str
    completion: str
    origin: str = ""

    def as_chat(self) -> ChatRecord:
        """The same as one user turn and one assistant turn."""
        turns = (Message("user", self.prompt), Message("assistant", self.completion))
        return ChatRecord(turns, self.origin)


Record = ChatRecord | CompletionRecord


def parse_line(line: Line) -> Record:
    """The record in a line of JSONL. Raises `DataError` with ``file:line`` and the reason."""
    try:
        text = line.raw.decode("utf-8-sig")  # a byte-order mark opens many files from Windows
    except UnicodeDecodeError as error:
        _fail(line.origin, f"not UTF-8 (byte {error.start + 1} of the line); convert the file.")
    try:
        value = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        _fail(line.origin, f"broken JSON: {error.msg} at column {error.colno}.")
    except (ValueError, RecursionError) as error:
        _fail(line.origin, f"broken JSON: {error}")
    return parse_record(value, line.origin)


def parse_record(value: object, origin: str) -> Record:
    """The record in a decoded JSON value. Raises `DataError` with ``origin`` and the reason."""
    if not isinstance(value, Mapping):
        _fail(origin, f"expected a JSON object, found {_kind(value)}.")
    for required, parse in SHAPES.items():
        if set(required) <= value.keys():
            _no_extra(value, required, origin, "record")
            return parse(value, origin)
    known = [key for required in SHAPES for key in required]
    hint = "".join(dict.fromkeys(suggest(str(key), known) for key in value))
    shapes = " or ".join("{" + ", ".join(required) + "}" for required in SHAPES)
    found = ", ".join(map(str, value)) or "none"
    _fail(origin, f"unknown shape of record, with the keys {found}.{hint} Expected {shapes}.")


def _chat(value: Mapping[str, Any], origin: str) -> ChatRecord:
    turns = value["messages"]
    if not isinstance(turns, list):
        _fail(origin, f"'messages' must be a list, found {_kind(turns)}.")
    messages = tuple(_message(turn, f"message {n}", origin) for n, turn in enumerate(turns, 1))
    check_roles(messages, origin)
    return ChatRecord(messages, origin)


def _message(turn: object, where: str, origin: str) -> Message:
    if not isinstance(turn, Mapping):
        _fail(origin, f"{where} must be an object with role and content, found {_kind(turn)}.")
    for key in ("role", "content"):
        if key not in turn:
            _fail(origin, f"{where} has no {key!r}.{suggest(key, map(str, turn), limit=1)}")
    role = turn["role"]
    if role not in ROLES:
        hint = suggest(role, ROLES) if isinstance(role, str) else ""
        _fail(origin, f"{where} has the role {role!r}.{hint} Known: {', '.join(ROLES)}.")
    optional = ("weight",) if role == "assistant" else ()
    _no_extra(turn, ("role", "content", *optional), origin, f"{where} ({role})")
    content = _text(turn["content"], f"content of {where} ({role})", origin)
    # An empty system turn is meaningful: it keeps a template from adding its own.
    if role != "system" and not content.strip():
        _fail(origin, f"{where} ({role}) is empty; give it content or remove the turn.")
    return Message(role, content, _weight(turn.get("weight", 1), where, origin))


def check_roles(messages: tuple[Message, ...], origin: str, *, answered: bool = True) -> None:
    """Raise `DataError` unless roles alternate; ``answered``: the assistant must come last."""
    roles = [message.role for message in messages]
    if answered and "assistant" not in roles:
        _fail(origin, "the conversation has no assistant turn, so there is nothing to learn.")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    first = len(roles) - len(turns) + 1
    for place, role in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            _fail(
                origin,
                f"roles out of order: message {first + place} is {role}, expected {expected} "
                "(an optional system turn, then user and assistant in turns).",
            )
    last = "assistant" if answered else "user"
    if not turns or turns[-1] != last:
        found = roles[-1] if roles else "nothing"
        _fail(origin, f"roles out of order: the last message is {found}, expected {last}.")


def _completion(value: Mapping[str, Any], origin: str) -> CompletionRecord:
    prompt = _text(value["prompt"], "'prompt'", origin)
    completion = _text(value["completion"], "'completion'", origin)
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not text.strip():
            _fail(origin, f"the {name} is empty.")
    return CompletionRecord(prompt, completion, origin)


# Required keys -> parser. The next shape is one more row.
SHAPES: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], Record]] = {
    ("messages",): _chat,
    ("prompt", "completion"): _completion,
}


def _text(value: object, what: str, origin: str) -> str:
    if not isinstance(value, str):
        _fail(origin, f"{what} must be a string, found {_kind(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        _fail(
            origin, f"{what} has half of a surrogate pair (\\ud800 to \\udfff), which is no text."
        )
    return value


def _weight(value: object, where: str, origin: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(cast(float, value)) or cast(float, value) < 0:
        _fail(origin, f"weight of {where} must be a number of at least 0, found {value!r}.")
    return float(cast(float, value))


def _no_extra(value: Mapping[str, Any], known: tuple[str, ...], origin: str, what: str) -> None:
    for key in value:
        if key not in known:
            hint = suggest(str(key), known) or f" Known: {', '.join(known)}."
            _fail(origin, f"unknown key {key!r} in the {what}.{hint}")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object.")
    return seen


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON.")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _fail(origin: str, reason: str) -> NoReturn:
    raise DataError(f"{origin}: {reason}" if origin else reason)
