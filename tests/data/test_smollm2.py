"""The real tokenizer of SmolLM2: a default system turn, no generation marks, padding = end of turn."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes import assets
from tests.data import kit
from trimtab.data import ChatRecord, Message, Renderer, collate, parse_record


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(assets.smollm2())
    except assets.UnavailableError as error:
        pytest.skip(str(error))


def test_trained_tokens_and_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    renderer = Renderer(tokenizer)
    answers = (" Good 🎉\n", "\n\nbad, 42 % of it")
    record = kit.chat("Is it?", answers[0], "And that?", answers[1])
    datum = renderer.render(record).datum()
    assert kit.trained(datum, tokenizer) == [answer + "<|im_end|>" for answer in answers]
    assert list(datum.tokens[: datum.prompt]) == renderer.prompt([Message("user", "Is it?")])
    text = tokenizer.decode(datum.tokens)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_the_end_of_turn_keeps_its_weight_among_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer)
    data = [renderer.render(kit.chat("Is it?", answer)).datum() for answer in ("no", "yes, " * 9)]
    batch = collate(data, pad_id=tokenizer.pad_token_id, packed=False)
    assert batch.attention_mask is not None
    ends = (batch.targets == tokenizer.eos_token_id) & (batch.weights > 0)
    assert ends.sum(dim=1).tolist() == [1, 1]
    assert batch.weights[batch.attention_mask == 0].sum() == 0


def test_real_conversations_are_what_transformers_makes_of_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    try:
        rows = assets.alpaca()[::5]
    except assets.UnavailableError as error:
        pytest.skip(str(error))
    renderer = Renderer(tokenizer)
    for row in rows:
        record = parse_record(row, "")
        assert isinstance(record, ChatRecord)
        turns = [{"role": turn.role, "content": turn.content} for turn in record.messages]
        rendered = renderer.render(record)
        assert list(rendered.ids) == tokenizer.apply_chat_template(turns, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            turns[:1], add_generation_prompt=True, return_dict=False
        )
        assert rendered.weights.index(1.0) == len(prompt)
        assert list(rendered.ids[: len(prompt)]) == prompt == renderer.prompt(record.messages[:1])
        assert kit.trained(rendered.datum(), tokenizer) == [turns[1]["content"] + "<|im_end|>"]
