"""ShareGPT's turns, ``{"from": "human", "value": "…"}``, with the calls of tools that LLaMA-Factory adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from trimtab.data.messages import (
    Message,
    Role,
    ToolCall,
    fail,
    in_text,
    kind_of,
    no_extra,
    parse_calls,
    parse_weight,
    text_of,
)
from trimtab.errors import suggest

FROM: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def parse_sharegpt(turns: object, system: object, origin: str) -> tuple[Message, ...]:
    """The messages in ShareGPT's ``conversations``; calls and their answers get ids, in order."""
    if not isinstance(turns, list | tuple):
        fail(origin, f"'conversations' must be a list, found {kind_of(turns)}.{in_text(turns)}")
    messages = [sharegpt_turn(turn, f"turn {n}", origin) for n, turn in enumerate(turns, 1)]
    if system is not None and text_of(system, "'system'", origin):
        if messages and messages[0].role == "system":
            fail(origin, "there is a 'system' text, and the first turn is from system too.")
        messages.insert(0, Message("system", text_of(system, "'system'", origin)))
    return tuple(_numbered(messages))


def sharegpt_turn(turn: object, where: str, origin: str) -> Message:
    """One turn. Raises `DataError`."""
    if not isinstance(turn, Mapping):
        fail(origin, f"{where} must be an object with from and value, found {kind_of(turn)}.")
    for key in ("from", "value"):
        if key not in turn:
            fail(origin, f"{where} has no {key!r}.{suggest(key, map(str, turn), limit=1)}")
    said_by = turn["from"]
    if said_by not in FROM:
        hint = suggest(said_by, FROM) if isinstance(said_by, str) else ""
        fail(origin, f"{where} is from {said_by!r}.{hint} Known: {', '.join(FROM)}.")
    role = FROM[said_by]
    where = f"{where} ({said_by})"
    no_extra(turn, ("from", "value", *(("weight",) if role == "assistant" else ())), origin, where)
    text = text_of(turn["value"], f"value of {where}", origin)
    weight = parse_weight(turn.get("weight", 1), where, origin)
    if said_by == "function_call":
        return Message("assistant", "", weight, tool_calls=_calls(text, where, origin))
    if role in ("user", "assistant") and not text.strip():
        fail(origin, f"{where} is empty; give it a value or remove the turn.")
    return Message(role, text, weight)


def _calls(text: str, where: str, origin: str) -> tuple[ToolCall, ...]:
    try:
        calls = json.loads(text)
    except ValueError as error:
        fail(origin, f"{where} is no JSON: {error}.")
    return parse_calls(calls if isinstance(calls, list) else [calls], where, origin)


def _numbered(messages: list[Message]) -> list[Message]:
    """Ids, which this shape has none of and some templates need: nine letters and digits, in order."""
    made = 0
    waiting: list[str] = []
    found = []
    for message in messages:
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                made += 1
                calls.append(replace(call, id=call.id or f"call{made:05d}"))
            waiting = [call.id for call in calls]
            message = replace(message, tool_calls=tuple(calls))
        elif message.role == "tool" and waiting:
            message = replace(message, tool_call_id=waiting.pop(0))
        found.append(message)
    return found
