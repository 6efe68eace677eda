"""Each shape of record is known by its keys; what fits two, or none, is told and never guessed."""

from __future__ import annotations

import json

import pytest

from trimtab.data import (
    ChatRecord,
    CompletionRecord,
    LabelledRecord,
    Message,
    PreferenceRecord,
    Record,
    TextRecord,
    ToolCall,
    UnpairedRecord,
    parse_record,
)
from trimtab.errors import DataError

USER, ASSISTANT = Message("user", "a"), Message("assistant", "b")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ASK = {"from": "human", "value": "a"}
WEATHER = {"name": "weather", "description": "Of a town.", "parameters": {"type": "object"}}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"t": "Oslo"}'},
}
CALLED = ToolCall("weather", {"t": "Oslo"}, "c1")


def assistant(**keys) -> dict:
    return {"role": "assistant", **keys}


def tool(content: str = "rain", **keys) -> dict:
    return {"role": "tool", "content": content, **keys}


GOOD: dict[str, tuple[dict, Record, str]] = {
    "chat": ({"messages": TURNS}, ChatRecord((USER, ASSISTANT)), "chat"),
    "chat with null keys": (
        {"messages": TURNS, "tools": None, "prompt": None},
        ChatRecord((USER, ASSISTANT)),
        "chat",
    ),
    "parts of text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("x ", "y")]},
                TURNS[1],
            ]
        },
        ChatRecord((Message("user", "x y"), ASSISTANT)),
        "chat",
    ),
    "a thought": (
        {"messages": [TURNS[0], assistant(content="b", reasoning_content="hm", name="Tab")]},
        ChatRecord((USER, Message("assistant", "b", name="Tab", reasoning="hm"))),
        "chat",
    ),
    "a developer": (
        {"messages": [{"role": "developer", "content": "c"}, *TURNS]},
        ChatRecord((Message("developer", "c"), USER, ASSISTANT)),
        "chat",
    ),
    "tools": (
        {
            "messages": [
                TURNS[0],
                assistant(content=None, tool_calls=[CALL]),
                tool(tool_call_id="c1"),
                tool("sun", name="weather"),
                assistant(tool_calls=[{"name": "weather", "arguments": {"t": "Oslo"}}]),
                tool(""),
                assistant(content="b"),
            ],
            "tools": [{"type": "function", "function": WEATHER}],
            "parallel_tool_calls": False,
        },
        ChatRecord(
            (
                USER,
                Message("assistant", "", tool_calls=(CALLED,)),
                Message("tool", "rain", tool_call_id="c1"),
                Message("tool", "sun", name="weather"),
                Message("assistant", "", tool_calls=(ToolCall("weather", {"t": "Oslo"}),)),
                Message("tool", ""),
                ASSISTANT,
            ),
            tools=({"type": "function", "function": WEATHER},),
        ),
        "chat",
    ),
    "completion": (
        {"prompt": "a", "completion": "b"},
        CompletionRecord("a", "b"),
        "prompt/completion",
    ),
    "completion of messages": (
        {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]},
        ChatRecord((USER, Message("assistant", "b", 0.0), USER, ASSISTANT)),
        "prompt/completion",
    ),
    "instruction": (
        {"instruction": "a", "output": "b"},
        ChatRecord((USER, ASSISTANT)),
        "instruction/input/output",
    ),
    "instruction with all": (
        {"instruction": "a", "input": "c", "output": "b", "system": "s", "history": [["q", "r"]]},
        ChatRecord(
            (
                Message("system", "s"),
                Message("user", "q"),
                Message("assistant", "r"),
                Message("user", "a\n\nc"),
                ASSISTANT,
            )
        ),
        "instruction/input/output",
    ),
    "instruction with nothing": (
        {"instruction": "a", "input": " ", "output": "b", "system": None, "history": []},
        ChatRecord((USER, ASSISTANT)),
        "instruction/input/output",
    ),
    "ShareGPT": (
        {
            "conversations": [
                ASK,
                {
                    "from": "function_call",
                    "value": '{"name": "weather", "arguments": {"t": "Oslo"}}',
                },
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "b", "weight": 0.5},
            ],
            "system": "s",
            "tools": json.dumps([WEATHER]),
        },
        ChatRecord(
            (
                Message("system", "s"),
                USER,
                Message(
                    "assistant", "", tool_calls=(ToolCall("weather", {"t": "Oslo"}, "call00001"),)
                ),
                Message("tool", "rain", tool_call_id="call00001"),
                Message("assistant", "b", 0.5),
            ),
            tools=({"type": "function", "function": WEATHER},),
        ),
        "ShareGPT",
    ),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        PreferenceRecord((USER,), (ASSISTANT,), (Message("assistant", "c"),)),
        "preference",
    ),
    "preference of messages": (
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [assistant(content="c")]},
        PreferenceRecord((USER,), (ASSISTANT,), (Message("assistant", "c"),)),
        "preference",
    ),
    "preference with an implicit prompt": (
        {"chosen": TURNS, "rejected": [TURNS[0], assistant(content="c")]},
        PreferenceRecord((USER,), (ASSISTANT,), (Message("assistant", "c"),)),
        "preference",
    ),
    "preference of ShareGPT": (
        {
            "conversations": [ASK],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        PreferenceRecord((USER,), (ASSISTANT,), (Message("assistant", "c"),)),
        "preference",
    ),
    "unpaired": (
        {"messages": TURNS, "label": True},
        UnpairedRecord((USER, ASSISTANT), True),
        "unpaired preference",
    ),
    "unpaired completion": (
        {"prompt": "a", "completion": "b", "label": False},
        UnpairedRecord((USER, ASSISTANT), False),
        "unpaired preference",
    ),
    "label": ({"text": "a", "label": "b"}, LabelledRecord("a", "b"), "labelled text"),
    "number": ({"text": "a", "label": 1}, LabelledRecord("a", 1), "labelled text"),
    "pair": (
        {"premise": "a", "hypothesis": "c", "label": 0.5},
        LabelledRecord("a", 0.5, "c"),
        "text pair",
    ),
    "pair alone": ({"text1": "a", "text2": "c"}, LabelledRecord("a", None, "c"), "text pair"),
    "text": ({"text": "a\n"}, TextRecord("a\n"), "text"),
}


@pytest.mark.parametrize("name", GOOD)
def test_shapes(name: str) -> None:
    value, expected, shape = GOOD[name]
    record = parse_record(value, "")
    assert record == expected
    assert record.shape == shape
    assert parse_record(value, "x:1").origin == "x:1"


def chat(*turns: dict, **more) -> dict:
    return {"messages": list(turns), **more}


BAD: dict[str, tuple[dict, str]] = {
    "two shapes": (
        {"messages": TURNS, "prompt": "a", "completion": "b"},
        r"fit several shapes of record: chat \(messages\) and prompt/completion .*'columns'",
    ),
    "two pairs": (
        {"text": "a", "text_pair": "b", "text2": "c"},
        r"fit several shapes of record: text pair \(text, text_pair\) and text pair \(text, text2\)",
    ),
    "metadata": (
        {"text": "a", "label": 1, "id": 7, "url": "x"},
        r"unknown keys 'id', 'url' in the record \(labelled text\).*Name the columns .*'ignore'",
    ),
    "all null": (
        {"prompt": "a", "completion": None},
        r"keys prompt, completion \(completion: null",
    ),
    "a list as text": (
        {"messages": json.dumps(TURNS)},
        "'messages' must be a list, found a string. It is JSON as text; decode it with a map",
    ),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, TURNS[1]),
        r"part 1 of message 1 \(user\) is a part of type 'image_url'; only parts of text",
    ),
    "a tool without a call": (chat(*TURNS, tool()), "message 3 is tool, expected user"),
    "a call without a tool": (
        chat(TURNS[0], assistant(tool_calls=[CALL]), TURNS[0], TURNS[1]),
        "message 3 is user, expected tool",
    ),
    "a tool that answers another call": (
        chat(TURNS[0], assistant(tool_calls=[CALL]), tool(tool_call_id="c2"), TURNS[1]),
        r"message 3 \(tool\) answers the call 'c2', and the assistant before it made 'c1'",
    ),
    "a tool last": (
        chat(TURNS[0], assistant(tool_calls=[CALL]), tool()),
        "the last message is tool, expected assistant",
    ),
    "calls of a user": (
        chat({**TURNS[0], "tool_calls": [CALL]}, TURNS[1]),
        "unknown key 'tool_calls'",
    ),
    "arguments that are no JSON": (
        chat(TURNS[0], assistant(tool_calls=[{"name": "f", "arguments": "{"}])),
        r"the arguments of call 1 of message 2 \(assistant\) are no JSON",
    ),
    "arguments that are no object": (
        chat(TURNS[0], assistant(tool_calls=[{"name": "f", "arguments": "[1]"}])),
        "must be an object, found a list",
    ),
    "a call without a name": (
        chat(TURNS[0], assistant(tool_calls=[{"arguments": {}}])),
        r"the name of call 1 of message 2 \(assistant\) must be a string, found null",
    ),
    "a tool without a name": (
        chat(*TURNS, tools=[{"nmae": "f"}]),
        "tool 1 has no name. Did you mean 'nmae'",
    ),
    "tools that are no JSON": ({"conversations": [ASK], "tools": "{"}, "no assistant turn"),
    "an unknown speaker": (
        {"conversations": [{"from": "humen", "value": "a"}]},
        "turn 1 is from 'humen'. Did you mean 'human'",
    ),
    "a call that is no JSON": (
        {"conversations": [ASK, {"from": "function_call", "value": "weather()"}]},
        r"turn 2 \(function_call\) is no JSON",
    ),
    "two systems": (
        {"conversations": [{"from": "system", "value": "s"}, ASK], "system": "t"},
        "there is a 'system' text, and the first turn is from system too",
    ),
    "no common start": (
        {"chosen": TURNS, "rejected": [{"role": "user", "content": "z"}, TURNS[1]]},
        "'chosen' and 'rejected' do not start alike, and there is no 'prompt'",
    ),
    "the same twice": (
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "'chosen' and 'rejected' are the same",
    ),
    "an empty side": ({"prompt": "a", "chosen": "b", "rejected": " "}, "the rejected is empty"),
    "a label of a conversation": (
        {"messages": TURNS, "label": 1},
        "'label' must be true or false beside a conversation, found 1",
    ),
    "a label of another type": (
        {"text": "a", "label": [1]},
        "'label' must be a string or a number",
    ),
    "a label that is no number": (
        {"text": "a", "label": float("nan")},
        "'label' must be a string or",
    ),
    "a pair that is half empty": ({"text": "a", "text_pair": ""}, "the text_pair is empty"),
    "a history of another kind": (
        {"instruction": "a", "output": "b", "history": [["q"]]},
        "item 1 of 'history' must be a list of a question and an answer",
    ),
    "an empty output": ({"instruction": "a", "output": ""}, "the output is empty"),
    "a prompt that ends with the assistant": (
        {"prompt": TURNS, "completion": [TURNS[1]]},
        "message 3 is assistant, expected user",
    ),
    "bytes": ({"text": b"a"}, "'text' must be a string, found a value of type bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records(name: str) -> None:
    value, reason = BAD[name]
    with pytest.raises(DataError, match=rf"^x:7.*: .*{reason}"):
        parse_record(value, "x:7")


def test_keys_say_what_a_record_says() -> None:
    def key(value: dict) -> bytes:
        return parse_record(value, "").key()

    first = key({"prompt": "Straße  ﬁne", "completion": "b"})
    assert len(first) == 16
    assert first == key({"prompt": "strasse\nFINE ", "completion": "B"})
    assert first == key(chat({"role": "user", "content": "STRASSE fine"}, TURNS[1]))
    different = [value for value, _, _ in GOOD.values()]
    keys = {json.dumps(value, default=str): key(value) for value in different}
    same = [
        ["chat", "chat with null keys", "completion", "instruction", "instruction with nothing"],
        ["preference", "preference of messages", "preference of ShareGPT"],
    ]
    for names in same:
        assert len({keys[json.dumps(GOOD[name][0])] for name in names}) == 1
    # What differs in any word, a call's argument or the answer of a tool is another record.
    changed = json.loads(json.dumps(GOOD["tools"][0]).replace("Oslo", "Rome"))
    assert key(changed) != key(GOOD["tools"][0])
    assert key({"text": "a", "label": 1}) != key({"text": "a", "label": 2})
    assert key({"prompt": "a b", "completion": "c"}) != key({"prompt": "a", "completion": "b c"})
