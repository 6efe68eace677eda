"""Whole training runs by turns, tiny: both sides see and learn the same, and the reports have what they promise."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks import __main__ as command
from benchmarks import classify, runs, scoring, sft
from benchmarks.bars import bars
from benchmarks.core import SideError
from tests.data import kit as data_kit
from tests.engine import kit

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "ship",
    "turns",
    "is",
    "the",
    "sea",
    "deep",
    "yes",
    "no",
]
RUN = ["--warmup", "1", "--rounds", "2", "--repeat", "1", "--patience", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The sides silence the libraries in a process of their own; here that ends with the test."""
    with warnings.catch_warnings():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    base = kit.base(kit.llama(positions=512))
    base.model.save_pretrained(folder)
    tokenizer: Any = base.tokenizer
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without dropout, so that both sides compute the same."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=data_kit.byte_level(None)._tokenizer, pad_token="<s>", sep_token="</s>"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=kit.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
        initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def text(number: int) -> str:
    """Distinct texts of mixed lengths."""
    return (
        " ".join(WORDS[(number * 5 + i) % len(WORDS)] for i in range(3 + number % 7)) + f" {number}"
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    made: dict[str, Any] = {
        "chats": [
            {"instruction": text(n), "input": text(n + 50) if n % 3 else "", "output": text(n + 99)}
            for n in range(20)
        ],
        "labelled": [[text(n), "good" if n % 2 else "bad"] for n in range(20)],
        "texts": [text(n) for n in range(20)],
    }
    for name, rows in made.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), "utf-8")
    return {name: str(folder / f"{name}.json") for name in made}


def report(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    ElementTree.fromstring((folder / f"{name}.svg").read_text("utf-8"))
    found = json.loads((folder / f"{name}.json").read_text("utf-8"))
    return found, (folder / f"{name}.md").read_text("utf-8")


def test_chats_are_the_same_tokens_and_the_same_answers_on_both_sides(
    model: str, files: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model": model,
        "data": files["chats"],
        "turns": 3,
        "batch": 4,
        "held_out": 4,
    }
    ours, peer = sft.Trimtab(**options), sft.Trl(True, str(tmp_path), **options)  # fmt: skip
    answers = sft.Yardstick(**options)
    learnt = ours.work.chats()[0]
    assert len(learnt) == 12
    rows = zip(ours.data, peer.trainer.train_dataset, learnt, strict=True)
    for datum, row, chat in rows:
        trained = [
            token
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
            if label != -100
        ]
        mine = [token for token, weight in zip(datum.targets, datum.weights, strict=True) if weight]
        assert (
            trained[: len(mine)] == mine and len(trained) - len(mine) == 1
        )  # the line break behind it
        assert row["input_ids"][: len(datum) + 1] == [datum.tokens[0], *datum.targets]
        ids, start = sft.answered(peer.trainer.processing_class, chat)
        assert ids[start:] == mine  # what the yardstick measures
    assert len(answers.rows) == 4  # fmt: skip
    first = [ours.step(0), peer.step(0)]
    assert first[0]["units"] == first[1]["units"] == 4
    assert first[1]["tokens"] - first[0]["tokens"] in range(9)
    assert first[0]["losses"] == pytest.approx(first[1]["losses"], rel=0.1)


@pytest.mark.usefixtures("forked")
def test_chats_are_measured_and_reported(model: str, files: dict[str, str], tmp_path: Path) -> None:
    options = [
        "--model",
        model,
        "--data",
        files["chats"],
        "--batch",
        "4",
        "--held-out",
        "4",
        "--rank",
        "4",
    ]
    assert command.main(["sft", *RUN, *options, "--out", str(tmp_path)]) == 0
    found, table = report(tmp_path, "sft")
    (row,) = found["rows"]
    assert row["allocator"] == "default" and set(row["sides"]) == {"trimtab", "trl", "trl, kept"}
    assert all(len(losses) == 3 for losses in row["losses"].values())
    ours, peer, kept = (side["held_out"]["value"] for side in row["sides"].values())
    base = row["base_held_out"]["value"]
    assert ours == pytest.approx(peer, rel=0.02) and peer == pytest.approx(kept, rel=0.02)
    assert ours != base
    assert row["against"]["trl"]["speed"]["median"] > 0 and row["turns"] == 3
    assert "**trimtab over trl, kept**" in table and "held-out loss" in table  # fmt: skip


def test_texts_to_classify_are_the_same_and_learnt_alike(
    encoder: str, files: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model": encoder, "task": "reviews", "data": files["labelled"], "turns": 2, "steps": 2, "batch": 4,
        "held_out": 4, "rank": 4, "dtype": "float32",
    }  # fmt: skip
    ours, peer = classify.Trimtab(**options), classify.Peft(str(tmp_path), **options)
    assert ours.facts() == peer.facts()
    for turn in range(2):
        one, other = ours.step(turn), peer.step(turn)
        assert (one["units"], one["tokens"]) == (other["units"], other["tokens"])
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)
    ruler = classify.Yardstick(**options)
    measured = []
    for name, side in (("ours", ours), ("peer", peer)):
        side.save(str(tmp_path / name))
        measured.append(ruler.measure(str(tmp_path / name))["losses"])
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)


@pytest.mark.usefixtures("forked")
def test_classifying_is_measured_and_reported(
    encoder: str, files: dict[str, str], tmp_path: Path
) -> None:
    options = [
        "--model",
        encoder,
        "--data",
        files["labelled"],
        "--batch",
        "4",
        "--held-out",
        "4",
        "--steps",
        "1",
    ]
    options += ["--dtypes", "float32"]
    assert command.main(["classify", *RUN, *options, "--out", str(tmp_path)]) == 0
    found, table = report(tmp_path, "classify")
    assert [row["task"] for row in found["rows"]] == ["reviews", "articles"]
    for row in found["rows"]:
        assert row["speed_ratio"]["low"] <= row["speed_ratio"]["median"] and row["memory_ratio"] > 0
        assert 0 <= row["sides"]["peft"]["accuracy"]["value"] <= 1
    assert "| articles | float32 | default | **ratio** |" in table  # fmt: skip


@pytest.mark.usefixtures("forked")
def test_scores_are_the_same_and_reported(
    model: str, files: dict[str, str], tmp_path: Path
) -> None:
    options = ["--model", model, "--data", files["texts"], "--texts", "12", "--batch", "4"]
    assert command.main(["scoring", *RUN, *options, "--out", str(tmp_path)]) == 0
    found, table = report(tmp_path, "scoring")
    (row,) = found["rows"]
    assert row["apart"]["round"] < scoring.TOLERANCE
    tokens = {(s["side"], s["step"]): s["result"]["tokens"] for s in row["samples"]}
    for step in range(3):
        assert len({tokens[side, step] for side in row["sides"]}) == 1
    assert sum(s["result"]["units"] for s in row["samples"] if s["counted"]) == 3 * 12
    assert "**trimtab over transformers, sorted**" in table


def test_too_few_rows_are_an_error(model: str, files: dict[str, str]) -> None:
    with pytest.raises(SideError, match="20 rows are too few for 80"):
        sft.Work(model, files["chats"], turns=10).chats()


def test_turns_hand_over_and_raise() -> None:
    seen = []

    def body() -> None:
        for number in range(2):
            seen.append(number)
            turns.pause()
        raise ValueError("on purpose")

    turns = runs.Turns(body)
    turns.turn()
    assert seen == [0]
    turns.turn()
    assert seen == [0, 1]
    with pytest.raises(ValueError, match="on purpose"):
        turns.turn()


def test_what_was_learnt_is_that_of_the_first_run() -> None:
    layer = torch.nn.Linear(2, 2)
    kept = runs.Kept(layer)
    with pytest.raises(RuntimeError, match="too few steps"):
        kept.put_back()
    before = layer.weight.detach().clone()
    kept.take()
    with torch.no_grad():
        layer.weight.zero_()
    kept.take()
    kept.put_back()
    assert torch.equal(layer.weight, before)


def test_bars_are_named_and_escaped() -> None:
    picture = bars({"a < b": {"ours": (2.0, "2.0"), "peer": (1.0, "1.0")}}, ours="ours")
    assert "a &lt; b" in picture
    widths = [e.attrib["width"] for e in ElementTree.fromstring(picture).iter() if "rect" in e.tag]
    assert float(widths[1]) == pytest.approx(2 * float(widths[2]), rel=0.01)
