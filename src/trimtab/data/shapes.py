"""Rows to records, strictly: a row is known by its keys, and what does not fit is an error that names
file and line.

| shape                    | keys                                                            |
| ------------------------ | --------------------------------------------------------------- |
| chat                     | messages (tools)                                                |
| prompt/completion        | prompt, completion (tools): two texts, or two lists of messages |
| instruction/input/output | instruction, output (input, system, history)                    |
| ShareGPT                 | conversations of {from, value} (system, tools)                  |
| preference               | chosen, rejected (prompt, or ShareGPT's conversations)          |
| unpaired preference      | messages, or prompt and completion; label: true or false        |
| labelled text            | text, label                                                     |
| text pair                | text, text_pair (label), and the names that GLUE's tasks have   |
| text                     | text                                                            |

The keys in parentheses may be absent. Any other key is an error: which columns are meant is for the
person to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from trimtab.data.messages import (
    Message,
    check_roles,
    fail,
    kind_of,
    parse_messages,
    parse_tools,
    text_of,
)
from trimtab.data.records import (
    ChatRecord,
    CompletionRecord,
    Label,
    LabelledRecord,
    PreferenceRecord,
    Record,
    TextRecord,
    UnpairedRecord,
    untrained,
)
from trimtab.data.sharegpt import parse_sharegpt, sharegpt_turn
from trimtab.data.source import Row
from trimtab.errors import suggest

Value = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """``parse`` makes a record of a row that has all ``required`` keys and some ``optional`` ones."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Value, str], Record]


def parse_row(row: Row) -> Record:
    """The record in a row. Raises `DataError` with the row's origin and the reason."""
    if row.fault:
        fail(row.origin, row.fault)
    return parse_record(row.value, row.origin)


def parse_record(value: object, origin: str) -> Record:
    """The record in a decoded value. Raises `DataError` with ``origin`` and the reason."""
    if not isinstance(value, Mapping):
        fail(origin, f"expected a JSON object, found {kind_of(value)}.")
    keys = frozenset(key for key, inner in value.items() if inner is not None)
    shape = _KNOWN.get(keys)
    if shape is None:
        shape = _shape(keys, value, origin)
        _KNOWN[keys] = shape
    return shape.parse(value, origin)


def _shape(keys: frozenset[str], value: Value, origin: str) -> Shape:
    candidates = [shape for shape in SHAPES if keys.issuperset(shape.required)]
    fitting = [shape for shape in candidates if keys.issubset((*shape.required, *shape.optional))]
    if fitting:
        return max(fitting, key=lambda shape: len(shape.required))
    if not candidates:
        _unknown(value, origin)
    largest = [
        shape
        for shape in candidates
        if not any(set(shape.required) < set(other.required) for other in candidates)
    ]
    if len(largest) > 1:
        names = " and ".join(f"{shape.name} ({', '.join(shape.required)})" for shape in largest)
        fail(origin, f"the keys {_list(value)} fit several shapes of record: {names}. {CHOOSE}")
    shape = largest[0]
    known = (*shape.required, *shape.optional)
    unknown = [key for key in value if key in keys.difference(known)]
    hint = suggest(str(unknown[0]), known) or f" Known: {', '.join(known)}."
    plural = "s" if len(unknown) > 1 else ""
    fail(
        origin,
        f"unknown key{plural} {', '.join(map(repr, unknown))} in the record ({shape.name})."
        f"{hint} {CHOOSE}",
    )


CHOOSE = "Name the columns that are meant with 'columns', or those to leave out with 'ignore'."


def _unknown(value: Value, origin: str) -> NoReturn:
    known = [key for shape in SHAPES for key in shape.required]
    hint = "".join(dict.fromkeys(suggest(str(key), known) for key in value))
    shapes = " or ".join("{" + ", ".join(shape.required) + "}" for shape in SHAPES[:10])
    nulls = [str(key) for key in value if value[key] is None]
    null = f" ({', '.join(nulls)}: null)" if nulls else ""
    fail(
        origin,
        f"unknown shape of record, with the keys {_list(value)}{null}.{hint} Expected {shapes}; "
        "rename columns with 'columns', or use a map function.",
    )


def _list(value: Value) -> str:
    return ", ".join(map(str, value)) or "none"


def _chat(value: Value, origin: str) -> ChatRecord:
    messages = parse_messages(value["messages"], "messages", origin)
    check_roles(messages, origin)
    return ChatRecord(messages, origin, parse_tools(value.get("tools"), origin))


def _completion(value: Value, origin: str) -> Record:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = untrained(parse_messages(prompt, "prompt", origin))
        after = parse_messages(completion, "completion", origin)
        check_roles((*before, *after), origin)
        check_roles(before, origin, answered=False)
        tools = parse_tools(value.get("tools"), origin)
        return ChatRecord((*before, *after), origin, tools, "prompt/completion")
    if value.get("tools"):
        fail(origin, "'tools' are for a prompt and a completion that are lists of messages.")
    return CompletionRecord(
        _filled(prompt, "prompt", origin), _filled(completion, "completion", origin), origin
    )


def _instruction(value: Value, origin: str) -> ChatRecord:
    turns: list[Message] = []
    if value.get("system") is not None:
        turns.append(Message("system", text_of(value["system"], "'system'", origin)))
    history = value.get("history") or []
    if not isinstance(history, list):
        fail(origin, f"'history' must be a list, found {kind_of(history)}.")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            fail(origin, f"item {number} of 'history' must be a list of a question and an answer.")
        turns.append(Message("user", _filled(pair[0], f"question {number} of history", origin)))
        turns.append(Message("assistant", _filled(pair[1], f"answer {number} of history", origin)))
    question = _filled(value["instruction"], "instruction", origin)
    given = value.get("input")
    if given is not None and text_of(given, "'input'", origin).strip():
        question = f"{question}\n\n{given}"
    turns.append(Message("user", question))
    turns.append(Message("assistant", _filled(value["output"], "output", origin)))
    return ChatRecord(tuple(turns), origin, shape="instruction/input/output")


def _sharegpt(value: Value, origin: str) -> ChatRecord:
    messages = parse_sharegpt(value["conversations"], value.get("system"), origin)
    check_roles(messages, origin)
    return ChatRecord(messages, origin, parse_tools(value.get("tools"), origin), "ShareGPT")


def _preference(value: Value, origin: str) -> PreferenceRecord:
    sides = [_side(value[side], side, origin) for side in ("chosen", "rejected")]
    if "prompt" in value and value["prompt"] is not None:
        prompt = _side(value["prompt"], "prompt", origin, role="user")
    else:
        shared = 0
        for left, right in zip(*sides, strict=False):
            if left != right:
                break
            shared += 1
        # The whole of one may be the start of the other: the last turn is an answer all the same.
        shared = min(shared, *(len(side) - 1 for side in sides))
        if not shared:
            fail(origin, "'chosen' and 'rejected' do not start alike, and there is no 'prompt'.")
        prompt = sides[0][:shared]
        sides = [side[shared:] for side in sides]
    return _pair(prompt, sides, value, origin)


def _pair(
    prompt: tuple[Message, ...], sides: list[tuple[Message, ...]], value: Value, origin: str
) -> PreferenceRecord:
    check_roles(prompt, origin, answered=False)
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        check_roles((*prompt, *side), f"{origin}, {name}" if origin else name)
    if sides[0] == sides[1]:
        fail(origin, "'chosen' and 'rejected' are the same.")
    tools = parse_tools(value.get("tools"), origin)
    return PreferenceRecord(prompt, sides[0], sides[1], origin, tools)


def _side(value: object, what: str, origin: str, role: str = "assistant") -> tuple[Message, ...]:
    if isinstance(value, str):
        content = _filled(value, what, origin)
        return (Message("user" if role == "user" else "assistant", content),)
    return parse_messages(value, what, origin)


def _sharegpt_preference(value: Value, origin: str) -> PreferenceRecord:
    prompt = parse_sharegpt(value["conversations"], value.get("system"), origin)
    sides: list[tuple[Message, ...]] = [
        (sharegpt_turn(value[side], f"{side!r}", origin),) for side in ("chosen", "rejected")
    ]
    return _pair(prompt, sides, value, origin)


def _unpaired(value: Value, origin: str) -> UnpairedRecord:
    label = value["label"]
    if not isinstance(label, bool):
        fail(origin, f"'label' must be true or false beside a conversation, found {label!r}.")
    if "messages" in value:
        chat: Record = _chat(value, origin)
    else:
        chat = _completion(value, origin)
    if isinstance(chat, CompletionRecord):
        chat = chat.as_chat()
    assert isinstance(chat, ChatRecord)
    return UnpairedRecord(chat.messages, label, origin, chat.tools)


def _labelled(value: Value, origin: str) -> LabelledRecord:
    label = _label(value["label"], origin)
    return LabelledRecord(_filled(value["text"], "text", origin), label, origin=origin)


def _pair_of_texts(first: str, second: str) -> Callable[[Value, str], LabelledRecord]:
    def parse(value: Value, origin: str) -> LabelledRecord:
        given = value.get("label")
        return LabelledRecord(
            _filled(value[first], first, origin),
            None if given is None else _label(given, origin),
            _filled(value[second], second, origin),
            origin,
            "text pair",
        )

    return parse


def _text(value: Value, origin: str) -> TextRecord:
    return TextRecord(_filled(value["text"], "text", origin), origin)


def _label(value: object, origin: str) -> Label:
    if isinstance(value, str):
        return _filled(value, "label", origin)
    if isinstance(value, bool | int | float) and value == value:  # a NaN is no label
        return value
    fail(origin, f"'label' must be a string or a number, found {kind_of(value)}.")


def _filled(value: object, what: str, origin: str) -> str:
    text = text_of(value, f"{what!r}", origin)
    if not text.strip():
        fail(origin, f"the {what} is empty.")
    return text


PAIRS = (
    ("text", "text_pair"),
    ("text", "text2"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)

# The next shape is one more row. Of several that fit, the one with most required keys is meant.
SHAPES: tuple[Shape, ...] = (
    Shape("chat", ("messages",), ("tools", "parallel_tool_calls"), _chat),
    Shape("prompt/completion", ("prompt", "completion"), ("tools",), _completion),
    Shape(
        "instruction/input/output",
        ("instruction", "output"),
        ("input", "system", "history"),
        _instruction,
    ),
    Shape("ShareGPT", ("conversations",), ("system", "tools"), _sharegpt),
    Shape("preference", ("chosen", "rejected"), ("prompt", "tools"), _preference),
    Shape(
        "preference, ShareGPT",
        ("conversations", "chosen", "rejected"),
        ("system", "tools"),
        _sharegpt_preference,
    ),
    Shape("labelled text", ("text", "label"), (), _labelled),
    Shape("text", ("text",), (), _text),
    Shape("unpaired preference", ("messages", "label"), ("tools",), _unpaired),
    Shape("unpaired preference", ("prompt", "completion", "label"), ("tools",), _unpaired),
    *(Shape("text pair", pair, ("label",), _pair_of_texts(*pair)) for pair in PAIRS),
)
_KNOWN: dict[frozenset[str], Shape] = {}
