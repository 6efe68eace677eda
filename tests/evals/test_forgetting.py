"""Forgetting: a plain text, its tokens, and what a change of the model does to it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.data import kit as data_kit
from tests.engine import kit
from trimtab.adapt.attach import attach
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import DataError
from trimtab.evals import Forgetting, forgetting, general_text, paragraphs
from trimtab.evals.forgetting import LONGEST, MOST_TOKENS, read_text
from trimtab.models.load import load


def test_the_text_is_ours_and_plain() -> None:
    text = general_text()
    assert 1500 <= len(text.split()) <= 2500
    assert text.isascii()
    assert len(text.split("\n\n")) == 16


def test_paragraphs_are_cut_and_bounded() -> None:
    tokenizer = data_kit.byte_level()
    data = paragraphs(general_text(), tokenizer, longest=100)
    assert all(len(datum) <= 99 for datum in data)
    assert sum(len(datum) + 1 for datum in data) <= MOST_TOKENS
    assert all(set(datum.weights) == {1.0} for datum in data)
    short = paragraphs("one two\n\n\n\nthree four", tokenizer)
    assert [datum.origin for datum in short] == ["paragraph 1", "paragraph 3"]
    (only,) = paragraphs("one two three", tokenizer)
    ids = tokenizer("one two three")["input_ids"]
    assert (list(only.tokens), list(only.targets)) == (ids[:-1], ids[1:])
    with pytest.raises(DataError, match="is empty"):
        paragraphs(" \n\n ", tokenizer)


def test_every_piece_begins_as_the_tokenizer_begins() -> None:
    tokenizer = data_kit.metaspace()
    begin = tokenizer.bos_token_id
    data = paragraphs("one two three four five six seven eight nine ten " * 9, tokenizer, longest=9)
    assert len(data) > 3
    assert all(datum.tokens[0] == begin for datum in data)
    assert all(begin not in datum.targets for datum in data)


def test_a_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Grüße")
    assert read_text(tmp_path / "mine.txt") == "Grüße"
    for name in ("none.txt", "latin.txt"):
        (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
        with pytest.raises(DataError, match=r"cannot read the text .* eval\.forgetting"):
            read_text(tmp_path / name)


def test_the_interval_is_that_of_the_log_over_paragraphs() -> None:
    before = Forgetting((10.0, 30.0, 60.0), (10.0, 15.0, 20.0))
    assert before.loss.value == pytest.approx(100 / 45)
    assert before.loss.count == 3
    assert before.perplexity.value == pytest.approx(math.exp(100 / 45))
    assert before.perplexity.low == pytest.approx(math.exp(before.loss.low))
    after = Forgetting((11.0, 31.5, 62.0), before.weights)  # a tenth of a nat worse, everywhere
    change = after.change(before)
    assert (change.value, change.low, change.high) == pytest.approx((0.1, 0.1, 0.1))
    assert not after.loss.apart(before.loss)
    assert Forgetting.of(after.fields()) == after
    with pytest.raises(DataError, match="different texts"):
        after.change(Forgetting((1.0,), (2.0,)))


def test_it_is_the_engines_loss_and_sees_a_damaged_model() -> None:
    base = kit.base()
    engine = Engine(base)
    adapter = attach(base.model, "lora(rank=2)", "a")
    data = paragraphs(general_text(), base.tokenizer, longest=64)
    bare = forgetting(engine, data, None)
    assert bare.loss.value == pytest.approx(engine.forward(data).mean)
    assert forgetting(engine, data, "a") == bare  # the adapter does nothing yet
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    assert forgetting(engine, data, "a").change(bare).low > 0


def test_a_real_model_reads_it_as_english(smollm2: Path) -> None:
    base = load(smollm2, dtype="bfloat16")
    data = paragraphs(general_text(), base.tokenizer)
    assert len(data) == 16
    assert sum(len(datum) for datum in data) < MOST_TOKENS
    assert max(len(datum) for datum in data) < LONGEST
    found = forgetting(Engine(base), data, None)
    assert 8 < found.perplexity.low < found.perplexity.value < found.perplexity.high < 40
    shuffled = [Datum.causal(d.targets[::-1], [1.0] * len(d), origin=d.origin) for d in data]
    assert forgetting(Engine(base), shuffled, None).perplexity.value > 200
