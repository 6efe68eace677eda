"""From a file to the steps of a run: tokenised once, and resumed at the exact example, also by way of JSON."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests.data import kit
from trimtab.data import (
    Corpus,
    CorpusFeed,
    ExampleConfig,
    Feed,
    JsonlFile,
    Outcomes,
    Renderer,
    Source,
    StreamFeed,
    load_examples,
    open_source,
    read_examples,
    strict,
    tokenise,
)
from trimtab.data.tokenise import MONTH
from trimtab.errors import DataError

CONFIG = ExampleConfig(context=30, too_long="drop", bad_rows="drop")


def rows(count: int) -> list[object]:
    return [{"prompt": f"one two {number}", "completion": f"{number}"} for number in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> JsonlFile:
    mixed = [*rows(10), "broken", {"prompt": "one " * 40, "completion": "x"}]
    return JsonlFile(kit.write_jsonl(tmp_path / "a.jsonl", mixed))


@pytest.mark.parametrize("cut", [{"examples": 3, "tokens": None}, {"examples": None, "tokens": 40}])
@pytest.mark.parametrize("kind", ["corpus", "stream"])
def test_the_whole_chain_resumes_at_the_exact_step(
    tmp_path: Path, file: JsonlFile, kind: str, cut: dict[str, int | None]
) -> None:
    renderer = Renderer(kit.byte_level())

    def feed() -> Feed:
        if kind == "corpus":
            portion, _ = tokenise(file, renderer, CONFIG, folder=tmp_path / "cache")
            return CorpusFeed(Corpus([portion]), **cut, seed=7)

        def read(start: int) -> Iterator:
            return strict(read_examples(file, renderer, Outcomes(CONFIG), start))

        return StreamFeed(read, file.digest, **cut, seed=7, window=6)

    whole = list(feed().steps(3))
    assert sum(len(step) for step, _ in whole) == 30
    for place, (_, cursor) in enumerate(whole, start=1):
        assert list(feed().steps(3, json.loads(json.dumps(cursor)))) == whole[place:]


def test_what_is_tokenised_once_is_found_again(tmp_path: Path, file: JsonlFile) -> None:
    renderer, cache = Renderer(kit.byte_level()), tmp_path / "cache"
    seen: list[tuple[int, int | None]] = []
    portion, outcomes = tokenise(
        file, renderer, CONFIG, folder=cache, progress=lambda *told: seen.append(told)
    )
    assert list(portion.file) == list(load_examples(file, renderer, CONFIG))
    assert seen[-1] == (10, 12)
    again, noted = tokenise(file, renderer, CONFIG, folder=cache, progress=lambda *_: 1 / 0)
    assert (again.digest, list(again.file)) == (portion.digest, list(portion.file))
    assert (str(noted), noted) == (str(outcomes), outcomes)
    assert str(noted) == (
        "12 rows of prompt/completion: 10 used, 2 dropped (1 malformed, 1 too long)."
    )


def test_whatever_changes_the_tokens_changes_the_name(tmp_path: Path, file: JsonlFile) -> None:
    def digest(*options: object) -> str:
        source, renderer, config = options
        return tokenise(source, renderer, config, folder=tmp_path / "cache")[0].digest

    renderer, config = Renderer(kit.byte_level()), CONFIG.replace(context=90)
    other = JsonlFile(kit.write_jsonl(tmp_path / "b.jsonl", rows(9)))
    found = {
        digest(file, renderer, config),
        digest(other, renderer, config),
        digest(file, Renderer(kit.byte_level(kit.CHATML)), config),
        digest(file, renderer, config.replace(context=29)),
    }
    assert len(found) == 4
    copy = JsonlFile(kit.write_jsonl(tmp_path / "copy.jsonl", rows(9)))
    assert digest(copy, renderer, config) == digest(other, renderer, config)


def test_a_torn_entry_is_made_again_and_an_old_one_goes(tmp_path: Path, file: JsonlFile) -> None:
    renderer, cache = Renderer(kit.byte_level()), tmp_path / "cache"
    portion, _ = tokenise(file, renderer, CONFIG, folder=cache)
    data = list(portion.file)
    (cache / portion.digest / "ids.bin").write_bytes(b"torn")
    assert list(tokenise(file, renderer, CONFIG, folder=cache)[0].file) == data
    old = time.time() - 2 * MONTH
    os.utime(cache / portion.digest / "meta.json", (old, old))
    tokenise(file, renderer, CONFIG.replace(context=29), folder=cache)
    assert portion.digest not in {entry.name for entry in cache.iterdir()}
    assert not list(cache.glob("*.lock"))


def test_an_error_leaves_nothing_in_the_cache(tmp_path: Path, file: JsonlFile) -> None:
    strictly = CONFIG.replace(bad_rows="error")
    with pytest.raises(DataError, match=r"a\.jsonl:11: broken JSON"):
        tokenise(file, Renderer(kit.byte_level()), strictly, folder=tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_a_stream_of_unknown_content_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    """Its digest covers the first rows only; the change lies behind them."""
    renderer = Renderer(kit.byte_level())

    def source(last: str) -> Source:
        def made() -> Iterator[object]:
            yield from [*rows(80), {"prompt": "the last", "completion": last}]

        return open_source(datasets.IterableDataset.from_generator(made))

    config = ExampleConfig(context=60)
    found = [
        tokenise(source(last), renderer, config, folder=tmp_path)[0] for last in ("a", "b", "b")
    ]
    assert source("a").digest == source("b").digest
    assert found[0].file[80] != found[1].file[80] == found[2].file[80]
    assert found[0].digest != found[1].digest == found[2].digest
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["stream", "cache"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    """Of the first rows and of three times as many; a million are measured in benchmarks/stream.py."""
    renderer, config = Renderer(kit.byte_level()), ExampleConfig(context=300)
    peaks = []
    for count in (1000, 3000):
        long = [{"prompt": f"{n} " + "ship " * 20, "completion": "sea"} for n in range(count)]
        source = JsonlFile(kit.write_jsonl(tmp_path / f"{count}.jsonl", long))
        tracemalloc.start()
        if kind == "stream":

            def read(start: int, source: JsonlFile = source) -> Iterator:
                return strict(read_examples(source, renderer, Outcomes(config), start))

            feed = StreamFeed(read, source.digest, examples=8, tokens=None, seed=0, window=200)
            assert sum(len(step) for step, _ in feed.steps(1)) == count
        else:
            assert len(tokenise(source, renderer, config, folder=tmp_path / "c")[0].file) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2000 * 80, peaks  # bytes: some numbers a row, but no row itself
