"""What is cut or dropped is counted and said; what is an error lists the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data import kit
from trimtab.data import (
    Datum,
    ExampleConfig,
    JsonlFile,
    Outcomes,
    Renderer,
    load_examples,
    open_source,
    preview,
    read_examples,
    strict,
)
from trimtab.errors import ConfigError, DataError

GOOD = {"prompt": "one two", "completion": " three"}
LONG = {"prompt": "a b c d e f g h i j", "completion": " k l m"}
TOKENIZER = kit.byte_level()


def load(tmp_path: Path, rows: list[object], **config):
    path = kit.write_jsonl(tmp_path / "a.jsonl", rows)
    return load_examples(path, Renderer(TOKENIZER), ExampleConfig(**config))


def test_all_used(tmp_path: Path) -> None:
    path = kit.write_jsonl(tmp_path / "a.jsonl", [GOOD, LONG])
    examples = load_examples(path, Renderer(TOKENIZER))
    assert str(examples.outcomes) == "2 rows of prompt/completion: 2 used."
    assert [datum.origin for datum in examples] == ["a.jsonl:1", "a.jsonl:2"]
    assert examples[-1] == examples[1:][0]
    assert (examples.name, examples.digest) == ("a.jsonl", JsonlFile(path).digest)


def test_too_long(tmp_path: Path) -> None:
    whole = load(tmp_path, [LONG])[0]
    context = len(whole) - 2
    with pytest.raises(DataError, match=rf"^a.jsonl:2: {len(whole)} tokens, more than the context"):
        load(tmp_path, [GOOD, LONG], context=context)
    dropped = load(tmp_path, [GOOD, LONG], context=context, too_long="drop")
    assert str(dropped.outcomes) == "2 rows of prompt/completion: 1 used, 1 dropped (1 too long)."
    for side, keep in (("left", slice(2, None)), ("right", slice(None, -2))):
        cut = load(tmp_path, [GOOD, LONG], context=context, too_long=side)
        assert str(cut.outcomes) == (
            f"2 rows of prompt/completion: 2 used (1 of them cut on the {side} to {context} tokens, 2 tokens lost)."
        )
        assert cut[1] == Datum(
            whole.tokens[keep], whole.targets[keep], whole.weights[keep], "a.jsonl:2"
        )
    exact = load(tmp_path, [LONG], context=len(whole))
    assert exact[0] == whole


def test_only_masked_tokens(tmp_path: Path) -> None:
    # Cut on the right, nothing of the answer is left.
    with pytest.raises(DataError, match=r"a.jsonl:2: only masked .* after \d+ tokens were cut"):
        load(tmp_path, [GOOD, LONG], context=5, too_long="right")
    dropped = load(tmp_path, [GOOD, LONG], context=5, too_long="right", masked="drop")
    assert (
        str(dropped.outcomes) == "2 rows of prompt/completion: 1 used, 1 dropped (1 only masked)."
    )


def test_only_masked_by_weight(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    path = kit.write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match=r"^a.jsonl:1: only masked tokens, nothing to learn.$"):
        load_examples(path, Renderer(kit.byte_level(kit.CHATML)))


def test_bad_rows_are_listed_together(tmp_path: Path) -> None:
    rows = [GOOD, "{", GOOD, {"prompt": "a"}]
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 4 rows of a.jsonl cannot be used:"
    assert [line.split(": ")[0] for line in lines[1:]] == ["a.jsonl:2", "a.jsonl:4"]
    with pytest.raises(DataError, match=r"^13 of 14 rows(.*\n){11}… and 3 more$"):
        load(tmp_path, [GOOD, *["{"] * 13])
    dropped = load(tmp_path, rows, bad_rows="drop")
    assert str(dropped.outcomes) == "4 rows of prompt/completion: 2 used, 2 dropped (2 malformed)."
    assert [problem.reason.split(": ")[0] for problem in dropped.outcomes.problems] == [
        "a.jsonl:2",
        "a.jsonl:4",
    ]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a.jsonl: no example is left. 1 rows of no record: 0 used.*:1: "
    ):
        load(tmp_path, ["{"], bad_rows="drop")


def test_streaming_stops_at_the_first_error(tmp_path: Path) -> None:
    file = JsonlFile(kit.write_jsonl(tmp_path / "a.jsonl", [GOOD, "{", GOOD]))
    outcomes = Outcomes(ExampleConfig())
    stream = strict(read_examples(file, Renderer(TOKENIZER), outcomes))
    assert next(stream).datum.origin == "a.jsonl:1"
    with pytest.raises(DataError, match=r"^a.jsonl:2: broken JSON"):
        next(stream)
    assert (outcomes.read, outcomes.used) == (2, 1)


def test_a_missing_template_is_said_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"^these are chat messages, and the tokenizer has no chat"):
        load(tmp_path, [{"messages": turns}] * 3, bad_rows="drop")


def test_plain_text_is_split_and_each_target_learnt_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz" * 3)
    whole = load_examples(path, Renderer(TOKENIZER))[0]
    with pytest.raises(DataError, match=r"set too_long to 'drop', 'left', 'right' or 'split'"):
        load_examples(path, Renderer(TOKENIZER), ExampleConfig(context=10))
    config = ExampleConfig(context=10, too_long="split")
    pieces = load_examples(path, Renderer(TOKENIZER), config)
    assert max(map(len, pieces)) == 10
    assert sum((piece.targets for piece in pieces), ()) == whole.targets
    assert "1 of them split into" in str(pieces.outcomes)
    outcomes = Outcomes(config)
    found = list(strict(read_examples(open_source(path), Renderer(TOKENIZER), outcomes)))
    assert len({example.key for example in found}) == len(pieces)
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* Only plain text can be split"):
        load(tmp_path, [LONG], context=5, too_long="split")


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="too_long"):
        ExampleConfig(too_long="cut")
    with pytest.raises(ConfigError, match="Did you mean 'context'"):
        ExampleConfig(contxt=3)
    with pytest.raises(ConfigError, match="context"):
        ExampleConfig(context=1)


def test_preview_marks_trained_tokens_with_and_without_colour() -> None:
    tokenizer = kit.byte_level(kit.MARKED)
    datum = Renderer(tokenizer).render(kit.chat("Hello", "yes 🎉", "and", "no")).datum()
    shown = preview(datum, tokenizer)
    body = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦yes 🎉<|im_end|>⟧\n"
        "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"
    )
    trained = sum(1 for weight in datum.weights if weight)
    assert str(shown) == (f"chat.jsonl:1\n{body}\n{trained} of {len(datum) + 1} tokens trained")
    assert [
        str(shown)[span.start : span.end] for span in shown.spans if "green" in str(span.style)
    ] == [
        "⟦yes 🎉<|im_end|>⟧",
        "⟦no<|im_end|>⟧",
    ]
    bare = str(preview(datum, tokenizer, brackets=False))
    assert bare == str(shown).replace("⟦", "").replace("⟧", "")
