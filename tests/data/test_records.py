"""Each bad row is an error that names the file, the line and the reason."""

from __future__ import annotations

import pytest

from trimtab.data import ChatRecord, CompletionRecord, Message, parse_record, parse_row
from trimtab.data.jsonl import decode_line
from trimtab.errors import DataError

USER = '{"role": "user", "content": "a"}'
ASSISTANT = '{"role": "assistant", "content": "b"}'


def of(text: str | bytes) -> ChatRecord | CompletionRecord:
    raw = text if isinstance(text, bytes) else text.encode()
    return parse_row(decode_line(raw, "data.jsonl:17"))


def chat(*turns: str) -> str:
    return '{"messages": [' + ", ".join(turns) + "]}"


BAD: dict[str, tuple[str | bytes, str]] = {
    "broken JSON": ('{"prompt": "a", ', "broken JSON: Expecting property name .* at column"),
    "two objects": ('{"prompt": "a"} {}', "broken JSON: Extra data"),
    "not UTF-8": (b'{"prompt": "\xff"}', r"not UTF-8 \(byte 13"),
    "a repeated key": ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
    "NaN": ('{"prompt": NaN}', "NaN is not JSON"),
    "too deep": ("[" * 100_000, "broken JSON"),
    "no object": ('["a"]', "expected a JSON object, found a list"),
    "null": ("null", "expected a JSON object, found null"),
    "an unknown shape": ('{"txt": "a"}', "unknown shape of record, with the keys txt"),
    "an empty object": ("{}", "with the keys none"),
    "a misspelt shape": ('{"mesages": []}', "Did you mean 'messages'"),
    "half a shape": ('{"prompt": "a"}', r"Expected \{messages\} or \{prompt, completion\} or"),
    "an extra key": (
        '{"prompt": "a", "completion": "b", "promt": "c"}',
        r"unknown key 'promt' in the record \(prompt/completion\). Did you mean 'prompt'",
    ),
    "two shapes": (
        chat(USER, ASSISTANT)[:-1] + ', "prompt": "c"}',
        r"unknown key 'prompt' in the record \(chat\). Known: messages.*'columns'",
    ),
    "messages of another type": ('{"messages": "a"}', "'messages' must be a list, found a string"),
    "a message of another type": ('{"messages": ["a"]}', "message 1 must be an object"),
    "no role": ('{"messages": [{"content": "a"}]}', "message 1 has no 'role'"),
    "no content": ('{"messages": [{"role": "user", "contents": "a"}]}', "Did you mean 'contents'"),
    "an unknown role": (
        chat('{"role": "asistant", "content": "a"}'),
        "message 1 has the role 'asistant'. Did you mean 'assistant'",
    ),
    "a role of another type": (chat('{"role": 1, "content": "a"}'), "has the role 1. Known"),
    "content of another type": (
        chat('{"role": "user", "content": ["a"]}'),
        r"part 1 of message 1 \(user\) is a string; only parts of text",
    ),
    "null content": (chat('{"role": "user", "content": null}'), "found null"),
    "an extra key in a message": (
        chat(USER, '{"role": "assistant", "content": "b", "nam": 1}'),
        r"unknown key 'nam' in the message 2 \(assistant\)",
    ),
    "a user's weight": (chat('{"role": "user", "content": "a", "weight": 1}'), "unknown key"),
    "a negative weight": (
        chat(USER, '{"role": "assistant", "content": "b", "weight": -1}'),
        r"weight of message 2 \(assistant\) must be a number of at least 0, found -1",
    ),
    "a boolean weight": (
        chat(USER, '{"role": "assistant", "content": "b", "weight": true}'),
        "weight of message 2 .* must be a number",
    ),
    "no messages": (chat(), "no assistant turn"),
    "no assistant": (chat(USER), "no assistant turn, so there is nothing to learn"),
    "an empty assistant": (
        chat(USER, '{"role": "assistant", "content": " \\n"}'),
        r"message 2 \(assistant\) is empty",
    ),
    "an empty user": (chat('{"role": "user", "content": ""}', ASSISTANT), "is empty"),
    "the assistant first": (
        chat(ASSISTANT, USER, ASSISTANT),
        "roles out of order: message 1 is assistant, expected user",
    ),
    "two users": (chat(USER, USER, ASSISTANT), "message 2 is user, expected assistant"),
    "two assistants": (chat(USER, ASSISTANT, ASSISTANT), "message 3 is assistant, expected user"),
    "a late system turn": (
        chat(USER, '{"role": "system", "content": "c"}', ASSISTANT),
        "message 2 is system, expected assistant",
    ),
    "two systems": (
        chat(*['{"role": "system", "content": "c"}'] * 2, ASSISTANT),
        "message 2 is system, expected user",
    ),
    "the user last": (chat(USER, ASSISTANT, USER), "last message is user, expected assistant"),
    "an empty prompt": ('{"prompt": " ", "completion": "b"}', "the prompt is empty"),
    "an empty completion": ('{"prompt": "a", "completion": ""}', "the completion is empty"),
    "a number": ('{"prompt": 1, "completion": "b"}', "'prompt' must be a string, found a number"),
    "a boolean": ('{"prompt": true, "completion": "b"}', "found a boolean"),
    "half a surrogate pair": ('{"prompt": "\\ud83c", "completion": "b"}', "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    text, reason = BAD[name]
    with pytest.raises(DataError, match=rf"^data\.jsonl:17: .*{reason}"):
        of(text)


def test_chat() -> None:
    record = of(chat('{"role": "system", "content": ""}', USER, ASSISTANT))
    assert record == ChatRecord(
        (Message("system", ""), Message("user", "a"), Message("assistant", "b")), "data.jsonl:17"
    )


def test_completion() -> None:
    record = of('\ufeff{"prompt": "a\\u2028", "completion": "b 🎉"}\r\n')
    assert record == CompletionRecord("a\u2028", "b 🎉", "data.jsonl:17")
    assert isinstance(record, CompletionRecord)
    assert record.as_chat().messages == (Message("user", "a\u2028"), Message("assistant", "b 🎉"))


def test_records_need_no_file() -> None:
    assert parse_record({"prompt": "a", "completion": "b"}, "") == CompletionRecord("a", "b")
    with pytest.raises(DataError, match=r"^the prompt is empty"):
        parse_record({"prompt": "", "completion": "b"}, "")
