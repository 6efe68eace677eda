"""Calls of tools are trained, their answers never; what is trained on is what is served."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from tests.data import kit
from tests.data.templates import CONTROLS, ENDS, SOURCES
from trimtab.data import ChatRecord, Message, RenderConfig, Renderer, ToolCall, parse_record
from trimtab.errors import DataError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
TOOLED = ("llama3", "qwen3", "mistral")


def call(town: str, number: int) -> ToolCall:
    return ToolCall("weather", {"town": town}, f"call{number:05d}")


SINGLE = ChatRecord(
    (
        Message("user", "Is it fine in Oslo?"),
        Message("assistant", "", tool_calls=(call("Oslo", 1),)),
        Message("tool", '"rain"', tool_call_id="call00001"),
        Message("assistant", "no, it is not"),
    ),
    "x:1",
    (WEATHER,),
)
DOUBLE = ChatRecord(
    (
        Message("system", "You are Tab."),
        *SINGLE.messages,
        Message("user", "And in Rome?"),
        Message("assistant", "", tool_calls=(call("Rome", 2),)),
        Message("tool", '"sun"', tool_call_id="call00002"),
        Message("assistant", "yes"),
    ),
    "x:2",
    (WEATHER,),
)
PLAIN = kit.chat("Hello there", " I am fine", "Is it?", "yes 🎉", system="You are Tab.")


def made(name: str, make: Callable = kit.byte_level) -> PreTrainedTokenizerBase:
    return make(SOURCES[name], eos=ENDS[name], controls=CONTROLS)


def written(tokenizer: PreTrainedTokenizerBase, record: ChatRecord) -> list[int]:
    """What transformers makes of the conversation by itself."""
    messages = []
    for m in record.messages:
        calls = [
            {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
            for c in m.tool_calls
        ]
        more = {"tool_calls": calls} if calls else {}
        more |= {"tool_call_id": m.tool_call_id} if m.tool_call_id else {}
        more |= {"reasoning_content": m.reasoning} if m.reasoning else {}
        messages.append({"role": m.role, "content": m.content, **more})
    return tokenizer.apply_chat_template(
        messages, tools=list(record.tools) or None, return_dict=False
    )


@pytest.mark.parametrize("make", [kit.byte_level, kit.metaspace])
@pytest.mark.parametrize(
    ("name", "record"),
    [
        (name, record)
        for name in SOURCES
        for record in (SINGLE, DOUBLE, PLAIN)
        if name in TOOLED or not record.tools
    ],
)
def test_served_prompts_are_what_comes_before_each_answer(
    name: str, record: ChatRecord, make: Callable
) -> None:
    tokenizer = made(name, make)
    renderer = Renderer(tokenizer)
    rendered = renderer.render(record)
    assert list(rendered.ids) == written(tokenizer, record)
    starts = [
        place
        for place, weight in enumerate(rendered.weights)
        if weight and not rendered.weights[place - 1]
    ]
    turns = [place for place, m in enumerate(record.messages) if m.role == "assistant"]
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        prompt = renderer.prompt(record.messages[:turn], tools=record.tools)
        # Mistral moves the tools and the system turn to the last question: earlier prompts differ.
        if name != "mistral" or turn == turns[-1] or record is SINGLE:
            assert list(rendered.ids[:start]) == prompt


TRAINED = {
    "llama3": [
        '{"name": "weather", "parameters": {"town": "Oslo"}}<|eot_id|>',
        "no, it is not<|eot_id|>",
    ],
    "qwen3": [
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nno, it is not<|im_end|>",
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Oslo"}, "id": "call00001"}]</s>',
        " no, it is not</s>",
    ],
}


@pytest.mark.parametrize("name", TOOLED)
def test_calls_are_trained_and_answers_of_tools_are_not(name: str) -> None:
    tokenizer = made(name)
    datum = Renderer(tokenizer).render(SINGLE).datum()
    assert kit.trained(datum, tokenizer) == TRAINED[name]
    last = Renderer(tokenizer, RenderConfig(train="last")).render(SINGLE).datum()
    assert kit.trained(last, tokenizer) == TRAINED[name][1:]
    runs = kit.trained(Renderer(tokenizer).render(DOUBLE).datum(), tokenizer)
    assert len(runs) == 4
    assert runs[0] == TRAINED[name][0]
    assert "Rome" in runs[2]
    assert not any("rain" in run or "sun" in run for run in runs)


@pytest.mark.parametrize("name", TOOLED)
def test_weights_of_calls(name: str) -> None:
    tokenizer = made(name)
    turns = [
        {"role": "user", "content": "Is it fine?"},
        {
            "role": "assistant",
            "weight": 0,
            "tool_calls": [{"id": "call00001", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "yes", "weight": 0.5},
    ]
    record = parse_record({"messages": turns, "tools": [WEATHER["function"]]}, "x:3")
    datum = Renderer(tokenizer).render(record).datum()
    (run,) = kit.trained(datum, tokenizer)
    assert run.strip().endswith("yes" + ENDS[name])
    assert set(datum.weights) == {0.0, 0.5}


def test_several_calls_and_answers_in_one_turn() -> None:
    tokenizer = made("qwen3")
    record = ChatRecord(
        (
            Message("user", "Where is it fine?"),
            Message("assistant", "one two", tool_calls=(call("Oslo", 1), call("Rome", 2))),
            Message("tool", "rain", tool_call_id="call00001"),
            Message("tool", "sun", tool_call_id="call00002"),
            Message("assistant", "Rome", reasoning="so"),
        ),
        "x:4",
        (WEATHER,),
    )
    runs = kit.trained(Renderer(tokenizer).render(record).datum(), tokenizer)
    assert runs[0].count("<tool_call>") == 2
    assert runs[0].startswith("one two\n<tool_call>")
    assert runs[1] == "<think>\nso\n</think>\n\nRome<|im_end|>"
    with pytest.raises(DataError, match="x:4: the chat template refuses it: one call a turn"):
        Renderer(made("llama3")).render(
            ChatRecord((*record.messages[:-1], Message("assistant", "Rome")), "x:4", record.tools)
        )


def test_what_a_template_would_leave_out_is_an_error() -> None:
    renderer = Renderer(made("smollm2"))
    with pytest.raises(
        DataError, match="x:1: the record declares tools, and the model's chat templ"
    ):
        renderer.render(SINGLE)
    with pytest.raises(DataError, match="x:1: a message has tool_calls, which the model's chat"):
        renderer.render(ChatRecord(SINGLE.messages, "x:1"))
    thinking = (Message("user", "a"), Message("assistant", "b", reasoning="hm"))
    with pytest.raises(DataError, match="a message has reasoning_content, which the model's"):
        renderer.render(ChatRecord(thinking, "x:1"))
    with pytest.raises(DataError, match="prompt: the record declares tools"):
        renderer.prompt([Message("user", "a")], tools=[WEATHER])
    with pytest.raises(DataError, match="tools need a chat"):
        Renderer(kit.byte_level()).prompt("a", tools=[WEATHER])


def test_ids_that_a_template_needs() -> None:
    turns = tuple(
        Message(
            m.role, m.content, tool_calls=tuple(ToolCall(c.name, c.arguments) for c in m.tool_calls)
        )
        for m in SINGLE.messages
    )
    with pytest.raises(DataError, match="x:1: the chat template refuses it: ids of nine"):
        Renderer(made("mistral")).render(ChatRecord(turns, "x:1", (WEATHER,)))


def test_a_developer_is_a_system_turn_where_the_template_knows_none() -> None:
    tokenizer = made("qwen3")
    record = ChatRecord((Message("developer", "c"), *kit.chat("a", "b").messages), "x:1")
    text = tokenizer.decode(Renderer(tokenizer).render(record).ids)
    assert text.startswith("<|im_start|>system\nc<|im_end|>")


def test_another_template_for_tools_is_used_with_tools() -> None:
    tokenizer = made("llama3")
    tokenizer.chat_template = {"default": SOURCES["llama3"], "tool_use": SOURCES["qwen3"]}
    renderer = Renderer(tokenizer)
    with_tools = tokenizer.decode(renderer.render(SINGLE).ids)
    assert "<tool_call>" in with_tools
    assert "<|eot_id|>" in tokenizer.decode(renderer.render(PLAIN).ids)


MARKED = (
    SOURCES["qwen3"]
    .replace(
        "        {%- if loop.index0 > ns.asked",
        "        {%- generation %}\n        {%- if loop.index0 > ns.asked",
    )
    .replace(
        "        {{- '<|im_end|>\n' }}\n    {%- elif m.role == 'tool' %}",
        "        {{- '<|im_end|>\n' }}{%- endgeneration %}\n    {%- elif m.role == 'tool' %}",
    )
)


@pytest.mark.parametrize("record", [SINGLE, DOUBLE, PLAIN], ids=["single", "double", "plain"])
def test_marks_and_differences_agree(record: ChatRecord) -> None:
    assert MARKED.count("generation %}") == 2 + SOURCES["qwen3"].count("generation %}")
    marked = kit.byte_level(MARKED, controls=CONTROLS)
    assert Renderer(marked).render(record) == Renderer(made("qwen3")).render(record)
