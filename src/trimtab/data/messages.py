"""Turns of a conversation: what a message may hold, and the order in which roles may come.

A conversation is an optional system (or developer) turn, then user and assistant in turns. After an
assistant that calls tools come the answers of the tools, then the assistant again. An assistant
message may carry ``"weight"``, a number ≥ 0 that scales its loss (0: not trained).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from trimtab.errors import DataError, suggest

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")
OPENING = ("system", "developer")
Tools = tuple[Mapping[str, Any], ...]

_KEYS: dict[str, tuple[str, ...]] = {
    "system": ("name",),
    "developer": ("name",),
    "user": ("name",),
    "assistant": ("name", "weight", "tool_calls", "reasoning_content"),
    "tool": ("name", "tool_call_id"),
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant calls. ``arguments`` is an object, decoded."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``weight`` scales the loss of an assistant's turn.

    ``reasoning`` is what an assistant thought before its answer, ``tool_calls`` what it asks for;
    ``tool_call_id`` says which call a tool's turn answers. Empty where there is none.
    """

    role: Role
    content: str
    weight: float = 1.0
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""


def parse_messages(turns: object, what: str, origin: str) -> tuple[Message, ...]:
    """The messages in a list in OpenAI's form. Raises `DataError`; roles are not yet in order."""
    if not isinstance(turns, list | tuple):
        fail(origin, f"{what!r} must be a list, found {kind_of(turns)}.{in_text(turns)}")
    prefix = "" if what == "messages" else f"{what}, "
    return tuple(_message(turn, f"{prefix}message {n}", origin) for n, turn in enumerate(turns, 1))


def _message(turn: object, where: str, origin: str) -> Message:
    if not isinstance(turn, Mapping):
        fail(origin, f"{where} must be an object with role and content, found {kind_of(turn)}.")
    calls = turn.get("tool_calls") or ()
    for key in ("role", "content"):
        if key not in turn and not (key == "content" and calls):
            fail(origin, f"{where} has no {key!r}.{suggest(key, map(str, turn), limit=1)}")
    role = turn["role"]
    if role not in ROLES:
        hint = suggest(role, ROLES) if isinstance(role, str) else ""
        fail(origin, f"{where} has the role {role!r}.{hint} Known: {', '.join(ROLES)}.")
    where = f"{where} ({role})"
    no_extra(turn, ("role", "content", *_KEYS[role]), origin, where)
    content = turn.get("content")
    text = "" if content is None and calls else _content(content, where, origin)
    # An empty system turn is meaningful: it keeps a template from adding its own.
    if role not in OPENING and role != "tool" and not calls and not text.strip():
        fail(origin, f"{where} is empty; give it content or remove the turn.")
    return Message(
        role,
        text,
        weight=parse_weight(turn.get("weight", 1), where, origin),
        name=_optional(turn, "name", where, origin),
        tool_calls=parse_calls(calls, where, origin),
        tool_call_id=_optional(turn, "tool_call_id", where, origin),
        reasoning=_optional(turn, "reasoning_content", where, origin),
    )


def _optional(turn: Mapping[str, Any], key: str, where: str, origin: str) -> str:
    value = turn.get(key)
    return "" if value is None else text_of(value, f"{key} of {where}", origin)


def _content(content: object, where: str, origin: str) -> str:
    """Text, or the texts of a list of parts joined."""
    if isinstance(content, str):
        return text_of(content, f"content of {where}", origin)
    if not isinstance(content, list):
        found = kind_of(content)
        fail(origin, f"content of {where} must be a string or a list of parts, found {found}.")
    texts = []
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            found = f"a part of type {kind!r}" if isinstance(part, Mapping) else kind_of(part)
            fail(origin, f"part {number} of {where} is {found}; only parts of text can be used.")
        no_extra(part, ("type", "text"), origin, f"part {number} of {where}")
        texts.append(text_of(part.get("text"), f"part {number} of {where}", origin))
    return "".join(texts)


def parse_calls(calls: object, where: str, origin: str) -> tuple[ToolCall, ...]:
    """Tool calls in OpenAI's form, ``{"type": "function", "id", "function": {"name", "arguments"}}``,
    or the function alone. Arguments may be JSON text or an object."""
    if not isinstance(calls, list | tuple):
        fail(origin, f"tool_calls of {where} must be a list, found {kind_of(calls)}.")
    return tuple(_call(call, f"call {n} of {where}", origin) for n, call in enumerate(calls, 1))


def _call(call: object, where: str, origin: str) -> ToolCall:
    if not isinstance(call, Mapping):
        fail(origin, f"{where} must be an object, found {kind_of(call)}.")
    function = call
    if "function" in call:
        no_extra(call, ("type", "id", "index", "function"), origin, where)
        if call.get("type", "function") != "function":
            fail(origin, f"{where} has the type {call['type']!r}; only 'function' is known.")
        function = call["function"]
        if not isinstance(function, Mapping):
            fail(origin, f"the function of {where} must be an object, found {kind_of(function)}.")
        no_extra(function, ("name", "arguments"), origin, f"function of {where}")
    else:
        no_extra(call, ("type", "id", "name", "arguments"), origin, where)
    name = text_of(function.get("name"), f"the name of {where}", origin)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            fail(origin, f"the arguments of {where} are no JSON: {error}.")
    if not isinstance(arguments, Mapping):
        fail(origin, f"the arguments of {where} must be an object, found {kind_of(arguments)}.")
    return ToolCall(name, arguments, _optional(call, "id", where, origin))


def parse_tools(tools: object, origin: str) -> Tools:
    """Declarations of tools, each put into OpenAI's form; JSON text of them is decoded."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            fail(origin, f"'tools' is no JSON: {error}.")
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        fail(origin, f"'tools' must be a list, found {kind_of(tools)}.")
    return tuple(_tool(tool, f"tool {n}", origin) for n, tool in enumerate(tools, 1))


def _tool(tool: object, where: str, origin: str) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(tool, Mapping) or not isinstance(function, Mapping):
        fail(origin, f"{where} must be an object that declares a function.")
    if not isinstance(function.get("name"), str):
        fail(origin, f"{where} has no name.{suggest('name', map(str, function), limit=1)}")
    return tool if "function" in tool else {"type": "function", "function": dict(function)}


def check_roles(messages: Sequence[Message], origin: str, *, answered: bool = True) -> None:
    """Raise `DataError` unless roles are in order; ``answered``: the assistant must come last."""
    roles = [message.role for message in messages]
    if answered and "assistant" not in roles:
        fail(origin, "the conversation has no assistant turn, so there is nothing to learn.")
    expected: tuple[str, ...] = ("user",)
    calls: tuple[ToolCall, ...] = ()
    for number, message in enumerate(messages, 1):
        if number == 1 and message.role in OPENING:
            continue
        if message.role not in expected:
            fail(
                origin,
                f"roles out of order: message {number} is {message.role}, expected "
                f"{' or '.join(expected)} (an optional system turn, then user and assistant in "
                "turns; tools answer after an assistant that calls them).",
            )
        if message.role == "user":
            expected = ("assistant",)
        elif message.role == "assistant":
            calls = message.tool_calls
            expected = ("tool",) if calls else ("user",)
        else:
            known = [call.id for call in calls if call.id]
            if message.tool_call_id and known and message.tool_call_id not in known:
                fail(
                    origin,
                    f"message {number} (tool) answers the call {message.tool_call_id!r}, and the "
                    f"assistant before it made {', '.join(map(repr, known))}.",
                )
            expected = ("tool", "assistant")
    allowed = ("assistant",) if answered else ("user", "tool")
    if not roles or roles[-1] not in allowed:
        found = roles[-1] if roles else "nothing"
        fail(origin, f"roles out of order: the last message is {found}, expected {allowed[0]}.")


def text_of(value: object, what: str, origin: str) -> str:
    """``value`` if it is text that can be encoded; else `DataError`."""
    if not isinstance(value, str):
        fail(origin, f"{what} must be a string, found {kind_of(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            fail(origin, f"{what} has half of a surrogate pair (\\ud800 to \\udfff): no text.")
    return value


def parse_weight(value: object, where: str, origin: str) -> float:
    """A finite number of at least 0; else `DataError`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(cast(float, value)) or cast(float, value) < 0:
        fail(origin, f"weight of {where} must be a number of at least 0, found {value!r}.")
    return float(cast(float, value))


def no_extra(value: Mapping[str, Any], known: Sequence[str], origin: str, what: str) -> None:
    """Raise `DataError` for a key that is not ``known``, unless it is null."""
    for key in value:
        if key not in known and value[key] is not None:
            hint = suggest(str(key), known) or f" Known: {', '.join(known)}."
            fail(origin, f"unknown key {key!r} in the {what}.{hint}")


def in_text(value: object) -> str:
    """What to do with a cell of a table that holds a list as JSON text."""
    listed = isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
    return " It is JSON as text; decode it with a map function." if listed else ""


def kind_of(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def fail(origin: str, reason: str) -> NoReturn:
    """Raise a `DataError` that begins with ``origin``."""
    raise DataError(f"{origin}: {reason}" if origin else reason)
