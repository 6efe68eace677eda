"""The quick way to ids and borders gives what the tokenizer gives, whatever the text holds."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tests.data import kit
from trimtab.data.encode import Encoder

CONTROLS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|end|>", "[INST]")
OTHERS = ("\n", " ", "  ", "<|", "|>", "user", "one two", " three", "é", "🎉", "is it?", "<", "s>")
PIECES = st.sampled_from([*CONTROLS, *OTHERS])
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)


@cache
def encoder(name: str) -> tuple[PreTrainedTokenizerBase, Encoder]:
    tokenizer = kit.metaspace() if name == "metaspace" else kit.byte_level()
    if name == "greedy":  # a token that takes the white space beside it, and one that is no control
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True), AddedToken("is it")])
    return tokenizer, Encoder(tokenizer)


@pytest.mark.parametrize("name", ["byte level", "metaspace", "greedy"])
@given(TEXTS)
def test_ids_and_borders(name: str, text: str) -> None:
    tokenizer, quick = encoder(name)
    ids = quick.ids(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    places = list(range(len(text) + 1))
    for place, border in zip(places, quick.borders(text, ids, places), strict=True):
        prefix = tokenizer.encode(text[:place], add_special_tokens=False)
        if border is not None:
            assert ids[:border] == prefix
        else:
            assert ids[: len(prefix)] != prefix


def test_the_state_of_another_call_does_not_matter() -> None:
    tokenizer = kit.byte_level()
    quick = Encoder(tokenizer)
    whole = quick.ids("one two three four")
    tokenizer("one", truncation=True, max_length=2, padding="max_length")
    assert quick.ids("one two three four") == whole == tokenizer.encode("one two three four")


def test_tokenizers_that_split_their_controls() -> None:
    tokenizer = kit.byte_level()
    tokenizer.split_special_tokens = True
    text = "a<|im_end|>"
    assert (
        Encoder(tokenizer).ids(text)
        == tokenizer(text)["input_ids"]
        != kit.byte_level().encode(text)
    )


def test_many_short_pieces_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Encoder(kit.byte_level())
    monkeypatch.setattr("trimtab.data.encode.KEPT", 3)
    for number in range(10):
        text = f"<|im_end|>{number}a"
        ids = quick.ids(text)
        assert quick.borders(text, ids, [len(text) - 1]) in ([2], [None])
    assert len(quick._pieces) <= 3
