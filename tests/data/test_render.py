"""Trained tokens are what the assistant says and what ends its turn, under every kind of template."""

from __future__ import annotations

import pytest

from tests.data import kit
from trimtab.data import (
    CompletionRecord,
    Message,
    RenderConfig,
    Renderer,
    parse_record,
)
from trimtab.errors import ConfigError, DataError, ModelError

TURNS = ("Hello there", "I am fine", "Is the sea deep?", "  yes\n\nit is 🎉 ")

TEMPLATES = {
    "chatml": (kit.CHATML, "<|im_end|>"),
    "marked": (kit.MARKED, "<|im_end|>"),
    "marked, end of turn outside": (kit.MARKED_CONTENT, "<|im_end|>"),
    "marked, line break inside": (kit.MARKED_BREAK, "<|im_end|>"),
    "counting (no prefix)": (kit.COUNTING, "<|im_end|>"),
    "plain": (kit.PLAIN, "\n"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|end|>"])
def test_trained_tokens_are_the_answers_and_their_ends(name: str, eos: str) -> None:
    template, end = TEMPLATES[name]
    tokenizer = kit.byte_level(template, eos=eos)
    datum = Renderer(tokenizer).render(kit.chat(*TURNS)).datum()
    assert kit.trained(datum, tokenizer) == [TURNS[1] + end, TURNS[3] + end]


@pytest.mark.parametrize(
    "template",
    [
        kit.CHATML,
        kit.MARKED,
        kit.MARKED_CONTENT,
        kit.PLAIN,
        kit.LLAMA2,
        kit.STRIPPING,
        kit.THINKING,
    ],
)
def test_what_is_trained_on_is_what_is_served(template: str) -> None:
    tokenizer = kit.byte_level(template)
    renderer = Renderer(tokenizer)
    record = kit.chat(*TURNS[:2])
    datum = renderer.render(record).datum()
    assert list(datum.tokens[: datum.prompt]) == renderer.prompt(record.messages[:1])
    whole = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in record.messages], return_dict=False
    )
    if template != kit.PLAIN:  # there the border lies within a token, and the prompt counts
        assert [datum.tokens[0], *datum.targets] == whole


def test_a_template_that_strips_white_space() -> None:
    tokenizer = kit.byte_level(kit.STRIPPING)
    datum = Renderer(tokenizer).render(kit.chat(*TURNS)).datum()
    assert kit.trained(datum, tokenizer) == ["I am fine<|im_end|>", "yes\n\nit is 🎉<|im_end|>"]


@pytest.mark.parametrize("make", [kit.byte_level, kit.metaspace])
def test_llama2_has_no_generation_prompt(make) -> None:
    tokenizer = make(kit.LLAMA2, eos="</s>")
    datum = Renderer(tokenizer).render(kit.chat("Hello", "I am fine", "deep?", "yes")).datum()
    assert [run.strip() for run in kit.trained(datum, tokenizer)] == ["I am fine </s>", "yes </s>"]
    assert datum.targets[-1] == tokenizer.eos_token_id


def test_metaspace_leaves_the_space_to_the_answer() -> None:
    tokenizer = kit.metaspace(kit.CHATML, eos="<|im_end|>")
    datum = Renderer(tokenizer).render(kit.chat("Hello", "yes", "no", "it is deep")).datum()
    assert [run.strip() for run in kit.trained(datum, tokenizer)] == [
        "yes<|im_end|>",
        "it is deep<|im_end|>",
    ]


def test_thoughts_of_earlier_turns_are_not_rendered_as_later_ones() -> None:
    tokenizer = kit.byte_level(kit.THINKING)
    datum = Renderer(tokenizer).render(kit.chat("a", "yes", "b", "no")).datum()
    assert kit.trained(datum, tokenizer) == ["yes<|im_end|>", "<think></think>no<|im_end|>"]


def test_an_answer_that_is_not_rendered_is_an_error_that_names_it() -> None:
    tokenizer = kit.byte_level(kit.DROPPING)
    with pytest.raises(DataError, match=r"^chat.jsonl:1: message 2 \(assistant\) cannot be found"):
        Renderer(tokenizer).render(kit.chat("a", "yes", "b", "no"))
    last = Renderer(tokenizer, RenderConfig(train="last")).render(kit.chat("a", "yes", "b", "no"))
    assert kit.trained(last.datum(), tokenizer) == ["no<|im_end|>"]


def test_answers_that_occur_elsewhere_are_found_where_they_are() -> None:
    tokenizer = kit.byte_level(kit.COUNTING)
    record = kit.chat("yes", "yes", "yes yes", "yes", system="yes")
    datum = Renderer(tokenizer).render(record).datum()
    assert kit.trained(datum, tokenizer) == ["yes<|im_end|>", "yes<|im_end|>"]


@pytest.mark.parametrize("template", [kit.CHATML, kit.MARKED])
def test_policies(template: str) -> None:
    tokenizer = kit.byte_level(template)
    record = kit.chat(*TURNS)
    last = Renderer(tokenizer, RenderConfig(train="last")).render(record).datum()
    assert kit.trained(last, tokenizer) == [TURNS[3] + "<|im_end|>"]
    everything = Renderer(tokenizer, RenderConfig(train="all")).render(record).datum()
    assert set(everything.weights) == {1.0}
    with pytest.raises(ConfigError, match="train='last'"):
        Renderer(tokenizer, RenderConfig(train="completion")).render(record)


@pytest.mark.parametrize("template", [kit.CHATML, kit.MARKED, kit.COUNTING])
def test_weights_of_messages(template: str) -> None:
    tokenizer = kit.byte_level(template)
    turns = ("user", "a", 1), ("assistant", "yes", 0), ("user", "b", 1), ("assistant", "no", 0.5)
    messages = [
        {"role": role, "content": content} | ({"weight": weight} if role == "assistant" else {})
        for role, content, weight in turns
    ]
    datum = Renderer(tokenizer).render(parse_record({"messages": messages}, "x:1")).datum()
    assert kit.trained(datum, tokenizer) == ["no<|im_end|>"]
    assert set(datum.weights) == {0.0, 0.5}


def test_a_default_system_turn_is_not_trained_and_can_be_emptied() -> None:
    tokenizer = kit.byte_level(kit.CHATML)
    renderer = Renderer(tokenizer)
    texts = [
        tokenizer.decode(renderer.render(record).ids)
        for record in (kit.chat("a", "b"), kit.chat("a", "b", system=""))
    ]
    assert "You are a helpful assistant." in texts[0]
    assert "helpful" not in texts[1]


def test_plain_completions_end_with_the_end_of_sequence() -> None:
    tokenizer = kit.byte_level()
    renderer = Renderer(tokenizer)
    # "Question: " + "yes": one token " yes" would hold the border, so the pieces are encoded apart.
    for prompt, completion in (("Answer:", " yes"), ("Answer: ", "yes"), ("Answ", "er: yes")):
        datum = renderer.render(CompletionRecord(prompt, completion, "x:1")).datum()
        assert kit.trained(datum, tokenizer) == [completion + "<|im_end|>"]
        assert list(datum.tokens[: datum.prompt]) == renderer.prompt(prompt)


def test_a_border_that_cannot_be_encoded_is_an_error() -> None:
    renderer = Renderer(kit.metaspace())
    with pytest.raises(DataError, match=r"^x:7: one token holds .* Move the white space"):
        renderer.render(CompletionRecord("Answer: ", "yes", "x:7"))
    good = renderer.render(CompletionRecord("Answer:", " yes", "x:7")).datum()
    assert kit.trained(good, renderer.tokenizer)[0].strip() == "yes</s>"
    assert good.tokens[0] == renderer.tokenizer.bos_token_id
    assert list(good.tokens[: good.prompt]) == renderer.prompt("Answer:")


def test_completions_are_chat_turns_where_there_is_a_template() -> None:
    tokenizer = kit.byte_level(kit.CHATML)
    record = CompletionRecord("Is it?", "yes", "x:1")
    auto, plain = Renderer(tokenizer), Renderer(tokenizer, RenderConfig(completions="plain"))
    assert auto.chats_completions
    assert auto.render(record) == auto.render(record.as_chat())
    assert auto.prompt("Is it?") == auto.prompt([Message("user", "Is it?")])
    assert tokenizer.decode(plain.render(record).ids) == "Is it?yes<|im_end|>"


def test_chat_without_a_template_says_what_to_do() -> None:
    renderer = Renderer(kit.byte_level())
    for call in (
        lambda: renderer.render(kit.chat("a", "b")),
        lambda: renderer.prompt([Message("user", "a")]),
    ):
        with pytest.raises(DataError, match=r"no chat template. Use the model's instruct variant"):
            call()
    with pytest.raises(ConfigError, match="completions='plain'"):
        Renderer(kit.byte_level(), RenderConfig(completions="chat"))


def test_plain_completions_need_an_end_token() -> None:
    tokenizer = kit.byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"set tokenizer.eos_token"):
        Renderer(tokenizer).render(CompletionRecord("a", "b", "x:1"))


def test_what_the_template_refuses_is_an_error_that_names_the_example() -> None:
    renderer = Renderer(kit.byte_level(kit.LLAMA2))
    with pytest.raises(DataError, match=r"^chat.jsonl:1: the chat template refuses it: no system"):
        renderer.render(kit.chat("a", "b", system="c"))


def test_prompts_must_end_with_the_user() -> None:
    renderer = Renderer(kit.byte_level(kit.CHATML))
    with pytest.raises(DataError, match="the last message is assistant, expected user"):
        renderer.prompt(kit.chat("a", "b").messages)
    with pytest.raises(DataError, match="the last message is nothing, expected user"):
        renderer.prompt([])


def test_named_templates_without_a_default() -> None:
    tokenizer = kit.byte_level()
    tokenizer.chat_template = {"rag": kit.CHATML, "tool_use": kit.CHATML}
    with pytest.raises(ModelError, match="chat template cannot be used"):
        Renderer(tokenizer)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="train"):
        RenderConfig(train="assistants")  # type: ignore[arg-type]
