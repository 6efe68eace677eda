"""Records that are no conversation: labelled texts, plain texts, preferences; and what renders them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.data import kit
from trimtab.data import (
    LabelledRecord,
    PreferenceRecord,
    Record,
    RenderConfig,
    Renderer,
    TextRecord,
    parse_record,
)
from trimtab.errors import ConfigError, DataError, ModelError

REVIEW = LabelledRecord("  the sea is deep\n", "yes", origin="x:1")
PAIR = LabelledRecord("one two", 1, "three", "x:2")


def trained(record: Record, template: str | None = kit.CHATML, **config) -> tuple[str, list[str]]:
    """The text that is rendered, and what of it is trained."""
    tokenizer = kit.byte_level(template)
    rendered = Renderer(tokenizer, RenderConfig(**config)).render(record)
    return tokenizer.decode(rendered.ids), kit.trained(rendered.datum(), tokenizer)


def test_a_label_is_the_answer_to_the_instruction() -> None:
    text, runs = trained(REVIEW, instruction="Question: is it?")
    assert runs == ["yes<|im_end|>"]
    assert "<|im_start|>user\nQuestion: is it?\n\n  the sea is deep\n<|im_end|>" in text
    text, runs = trained(REVIEW, instruction="is {text} {it}? {text}")
    assert "user\nis   the sea is deep\n {it}?   the sea is deep\n<|im_end|>" in text
    text, runs = trained(REVIEW, template=None, instruction="Is it? {text}Answer: ")
    assert text == "Is it?   the sea is deep\nAnswer: yes<|im_end|>"
    assert runs == ["yes<|im_end|>"]


def test_numbers_have_names() -> None:
    for label, name in ((1, "yes"), (True, "yes"), (0, "no"), ("no", "no"), ("1", "yes")):
        record = LabelledRecord("a", label, origin="x:1")
        assert trained(record, instruction="?", labels=("no", "yes"))[1] == [f"{name}<|im_end|>"]
    for label in (2, -1, "maybe", 0.5, "2"):
        record = LabelledRecord("a", label, origin="x:1")
        with pytest.raises(
            DataError, match=r"^x:1: the label .* is not one of 0 \(no\), 1 \(yes\)\."
        ):
            trained(record, instruction="?", labels=("no", "yes"))
    with pytest.raises(ConfigError, match=r"x:2: the label is a number \(1\); say .*labels=\('no'"):
        trained(PAIR, instruction="?")


def test_pairs() -> None:
    config = {"labels": ("no", "yes"), "instruction": "Do they agree?"}
    text, runs = trained(PAIR, **config)
    assert "user\nDo they agree?\n\none two\n\nthree<|im_end|>" in text
    assert runs == ["yes<|im_end|>"]
    text, _ = trained(PAIR, **{**config, "instruction": "{text} - {text_pair}?"})
    assert "user\none two - three?<|im_end|>" in text
    for instruction, reason in (
        ("{text}?", "the record has a second text"),
        ("{text_pair}?", r"a place for \{text_pair\} and none for \{text\}"),
    ):
        with pytest.raises(ConfigError, match=reason):
            trained(PAIR, **{**config, "instruction": instruction})
    with pytest.raises(ConfigError, match="the record has no second text"):
        trained(REVIEW, instruction="{text} - {text_pair}")
    with pytest.raises(
        ConfigError, match="x:3: a pair of texts without a label has nothing to lea"
    ):
        trained(LabelledRecord("a", None, "b", "x:3"), instruction="?")


def test_a_text_in_the_place_of_a_placeholder_is_not_filled_in() -> None:
    record = LabelledRecord("{text_pair}", "yes", "{text}")
    text, _ = trained(record, instruction="{text} | {text_pair}")
    assert "user\n{text_pair} | {text}<|im_end|>" in text


def test_what_asks_is_what_was_trained() -> None:
    tokenizer = kit.byte_level(kit.CHATML)
    renderer = Renderer(tokenizer, RenderConfig(instruction="Is it? {text}", labels=("no", "yes")))
    datum = renderer.render(LabelledRecord("deep", 1)).datum()
    assert list(datum.tokens[: datum.prompt]) == renderer.prompt(renderer.question("deep"))
    with pytest.raises(ConfigError, match=r"x:1: a labelled text needs an instruction .*example"):
        trained(REVIEW)
    with pytest.raises(ConfigError, match="needs an instruction"):
        Renderer(tokenizer).question("a")


@pytest.mark.parametrize("template", [None, kit.CHATML])
@pytest.mark.parametrize("train", ["assistant", "all"])
def test_every_token_of_a_text_is_trained_and_its_end(template: str | None, train: str) -> None:
    for make in (kit.byte_level, kit.metaspace):
        tokenizer = make(template, eos="</s>")
        renderer = Renderer(tokenizer, RenderConfig(train=train))  # type: ignore[arg-type]
        rendered = renderer.render(TextRecord("one two\n three", "x:1"))
        begins = make is kit.metaspace
        assert (rendered.ids[0] == tokenizer.bos_token_id) == begins
        assert rendered.ids[-1] == tokenizer.eos_token_id
        assert list(rendered.ids[begins:-1]) == tokenizer.encode(
            "one two\n three", add_special_tokens=False
        )
        assert set(rendered.weights) == {1.0}


def test_plain_text_has_no_answer() -> None:
    for train in ("last", "completion"):
        with pytest.raises(ConfigError, match=f"x:1: train='{train}' is for answers"):
            trained(TextRecord("a", "x:1"), train=train)
    tokenizer = kit.byte_level(kit.CHATML)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"set tokenizer.eos_token"):
        Renderer(tokenizer).render(TextRecord("a", "x:1"))


PREFERRED = {"prompt": "a", "chosen": "yes", "rejected": "no"}


def test_preferences_train_the_chosen_answer_if_they_are_told_to() -> None:
    record = parse_record(PREFERRED, "x:1")
    with pytest.raises(ConfigError, match=r"x:1: this is a preference record .*'chosen'"):
        trained(record)
    assert trained(record, preference="chosen")[1] == ["yes<|im_end|>"]
    turns = [
        {"role": role, "content": content}
        for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    record = parse_record({**PREFERRED, "prompt": turns}, "x:1")
    assert isinstance(record, PreferenceRecord)
    assert trained(record, preference="chosen")[1] == ["yes<|im_end|>"]
    unpaired = parse_record({"messages": [*turns[:2]], "label": True}, "x:2")
    with pytest.raises(ConfigError, match="x:2: .*ignore the column 'label'"):
        trained(unpaired, preference="chosen")


def test_completions_of_messages_train_the_completion_alone() -> None:
    turns = [
        {"role": role, "content": content}
        for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    last = {"role": "assistant", "content": "yes"}
    record = parse_record({"prompt": turns, "completion": [last]}, "x:1")
    for train in ("assistant", "completion", "last"):
        assert trained(record, train=train)[1] == ["yes<|im_end|>"]
    record = parse_record({"messages": [*turns, last]}, "x:1")
    with pytest.raises(ConfigError, match="train='completion' is for prompt/completion records"):
        trained(record, train="completion")


FINGERPRINT = """
import sys
from transformers import AutoTokenizer
from trimtab.data import RenderConfig, Renderer
print(Renderer(AutoTokenizer.from_pretrained(sys.argv[1]), RenderConfig(train="last")).fingerprint())
"""


def test_the_fingerprint_is_that_of_what_decides_the_ids(tmp_path: Path) -> None:
    kit.byte_level(kit.CHATML).save_pretrained(tmp_path)
    config = RenderConfig(train="last")

    def fingerprint(config: RenderConfig = config, **changes) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        renderer = Renderer(tokenizer, config)
        tokenizer("a", truncation=True, max_length=3, padding="max_length")  # leaves no trace
        return renderer.fingerprint()

    first = fingerprint()
    assert len(first) == 64
    others = [
        fingerprint(RenderConfig()),
        fingerprint(RenderConfig(train="last", labels=("a", "b"))),
        fingerprint(chat_template=kit.MARKED),
        fingerprint(eos_token="<|end|>"),
    ]
    assert len({first, *others}) == 5
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    elsewhere = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert elsewhere.stdout.strip() == first
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint() != first
