"""Examples on disk, their mixes, and the steps that are made of them."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data import Corpus, CorpusFeed, Cursor, Datum, Portion, StreamFeed, distinct, without
from trimtab.data.examples import Example
from trimtab.data.token_file import TokenFile, TokenWriter
from trimtab.errors import DataError, FileFormatError


def datum(length: int, number: int = 0) -> Datum:
    """One whose tokens tell which it is."""
    ids = [number, *range(length)]
    return Datum.causal(ids, [place % 2 * 0.5 for place in range(length + 1)], origin=f"é:{number}")


def portion(
    folder: Path, lengths: list[int], *, keys: list[int] | None = None, weight: float = 1.0
) -> Portion:
    folder.mkdir(parents=True)
    with TokenWriter(folder) as writer:
        for number, length in enumerate(lengths):
            writer.add(datum(length, number), keys[number] if keys else number * 2**50 + 7)
        writer.close({})
    file = TokenFile(folder)
    return Portion(file, np.arange(len(file)), folder.name, folder.name, weight)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    part = portion(tmp_path / "a", [3, 1, 8], keys=[5, 2**64 - 1, 0])
    assert list(part.file) == [datum(3, 0), datum(1, 1), datum(8, 2)]
    assert part.file[-1] == datum(8, 2)
    assert part.file[1:] == [datum(1, 1), datum(8, 2)]
    assert part.keys.tolist() == [5, 2**64 - 1, 0]
    assert part.file.lengths.tolist() == [3, 1, 8]
    assert part.file.trained.tolist() == [2, 1, 4]
    with pytest.raises(IndexError):
        part.file[3]


def test_a_torn_or_unfinished_file_is_refused(tmp_path: Path) -> None:
    folder = portion(tmp_path / "a", [3, 1]).file.folder
    (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"ids\.bin is torn"):
        TokenFile(folder)
    (tmp_path / "b").mkdir()
    with TokenWriter(tmp_path / "b") as writer:
        writer.add(datum(4), 1)
    with pytest.raises(FileFormatError, match="no folder of tokenised examples"):
        TokenFile(tmp_path / "b")


def test_targets_must_be_the_tokens_that_follow(tmp_path: Path) -> None:
    with TokenWriter(tmp_path) as writer, pytest.raises(DataError, match="tokens that follow"):
        writer.add(Datum((1, 2), (3, 4), (1.0, 1.0)), 0)


def test_weights_say_how_often_an_epoch_shows_an_example(tmp_path: Path) -> None:
    corpus = Corpus(
        [
            portion(tmp_path / "a", [1] * 10, weight=2.0),
            portion(tmp_path / "b", [1] * 8, weight=0.25),
            portion(tmp_path / "c", [1] * 3, weight=1.5),
        ]
    )
    epochs = [Counter(corpus.order(epoch, seed=1)) for epoch in range(4)]
    for shown in epochs:
        assert [shown[place] for place in range(10)] == [2] * 10
        assert sum(shown[place] for place in range(10, 18)) == 2
    # What a fraction leaves out comes in the next epochs.
    assert all(sum(shown[place] for shown in epochs) == 1 for place in range(10, 18))
    assert corpus.order(0, seed=1) == corpus.order(0, seed=1) != corpus.order(1, seed=1)


def test_duplicates_and_leaks(tmp_path: Path) -> None:
    parts = [
        portion(tmp_path / "a", [1, 2, 3], keys=[7, 8, 7]),
        portion(tmp_path / "b", [4, 5], keys=[8, 9]),
    ]
    kept, repeated = distinct(parts)
    assert repeated == 2
    assert [part.keys.tolist() for part in kept] == [[7, 8], [9]]
    left, leaked = without(kept, np.array([8, 99], np.uint64))
    assert leaked == 1
    assert [len(one) for one in Corpus(left)] == [1, 5]


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(0, 60))
def test_a_split_is_stable_when_rows_are_added(seed: int, count: int, more: int) -> None:
    draw = random.Random(seed)
    keys = np.array([draw.randrange(2**64) for _ in range(count + more)], np.uint64)

    class Keys(TokenFile):
        def __init__(self, keys: np.ndarray) -> None:
            self.keys = keys

    def held(total: int) -> set[int]:
        rest, out = Portion(Keys(keys), np.arange(total), "", "").parted(0.3)
        assert sorted([*rest.chosen, *out.chosen]) == list(range(total))
        return {int(place) for place in out.chosen}

    assert held(count) == {place for place in held(count + more) if place < count}


@pytest.mark.parametrize("cut", [{"examples": 5, "tokens": None}, {"examples": None, "tokens": 12}])
def test_every_example_once_an_epoch_and_resumed_at_the_exact_step(
    tmp_path: Path, cut: dict[str, int | None]
) -> None:
    draw = random.Random(2)
    corpus = Corpus([portion(tmp_path / "a", [draw.randint(1, 12) for _ in range(43)])])
    feed = CorpusFeed(corpus, **cut, seed=3)
    steps = list(feed.steps(2))
    assert len(steps) == feed.total(2)
    first = [cursor["epoch"] for _, cursor in steps].index(1)
    for epoch in (steps[:first], steps[first:]):
        assert sorted(one.tokens[0] for data, _ in epoch for one in data) == list(range(43))
    assert steps[0][0] != steps[first][0]
    if cut["tokens"]:
        sizes = [sum(map(len, data)) for data, _ in steps]
        assert max(sizes) <= 12
        assert sum(size == 12 for size in sizes) > len(sizes) // 2  # best fit
    for place in range(len(steps)):
        again = list(CorpusFeed(corpus, **cut, seed=3).steps(2, steps[place][1]))
        assert again == steps[place + 1 :]
    forever = list(islice(feed.steps(None), len(steps) + 2))
    assert forever[: len(steps)] == steps


def test_a_cursor_of_other_data_is_refused(tmp_path: Path) -> None:
    corpus = Corpus([portion(tmp_path / "a", [2] * 6)])
    _, cursor = next(CorpusFeed(corpus, examples=2, tokens=None, seed=0).steps(1))
    other = Corpus([portion(tmp_path / "b", [2] * 6)])
    for feed, word in (
        (CorpusFeed(corpus, examples=2, tokens=None, seed=1), "seed"),
        (CorpusFeed(corpus, examples=3, tokens=None, seed=0), "content hash"),
        (CorpusFeed(other, examples=2, tokens=None, seed=0), "content hash"),
    ):
        with pytest.raises(DataError, match=f"cannot resume: the {word}"):
            next(feed.steps(1, cursor))


def test_what_no_step_can_hold_is_named(tmp_path: Path) -> None:
    corpus = Corpus([portion(tmp_path / "a", [2, 9])])
    with pytest.raises(DataError, match=r"é:1: 9 tokens, more than a step may have \(8\)"):
        CorpusFeed(corpus, examples=None, tokens=8, seed=0)
    with pytest.raises(DataError, match="a step needs"):
        CorpusFeed(corpus, examples=0, tokens=None, seed=0)


@given(
    st.integers(0, 999),
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.sampled_from([{"examples": 4, "tokens": None}, {"examples": None, "tokens": 15}]),
)
def test_a_stream_visits_all_and_resumes_at_the_exact_step(
    seed: int, parts: list[int], cut: dict[str, int | None]
) -> None:
    """Rows that give no example, one, or several."""
    draw = random.Random(seed)
    rows = [[draw.randint(1, 9) for _ in range(count)] for count in parts]
    started: list[int] = []

    def read(start: int):  # type: ignore[no-untyped-def]
        started.append(start)
        for row in range(start, len(rows)):
            for number, length in enumerate(rows[row]):
                yield Example(datum(length, 100 * row + number), 0, row)

    def feed() -> StreamFeed:
        return StreamFeed(read, "d", **cut, seed=seed, window=8)

    total = sum(parts)
    if total == 0:
        with pytest.raises(DataError, match="no example"):
            next(feed().steps(2))
        return
    steps = list(feed().steps(2))
    for epoch in (0, 1):
        seen = [one for data, cursor in steps if cursor["epoch"] == epoch for one in data]
        assert sorted(one.tokens[0] for one in seen) == [
            100 * row + number for row, count in enumerate(parts) for number in range(count)
        ]
    cursors: list[Cursor] = [cursor for _, cursor in steps]
    for place, cursor in enumerate(cursors):
        started.clear()
        assert list(feed().steps(2, cursor)) == steps[place + 1 :]
        assert started[0] == cursor["row"]  # nothing before the window is read again


def test_what_was_packed_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus([portion(tmp_path / "a", [3, 5, 2, 7, 1, 4] * 5)])

    def epoch(number: int, **changes: int) -> list[list[int]]:
        options = {"examples": None, "tokens": 9, "seed": 1, **changes}
        return CorpusFeed(corpus, **options, cache=tmp_path / "c").epoch(number)

    made = [epoch(0), epoch(1), epoch(0, seed=2), epoch(0, tokens=12)]
    files = sorted((tmp_path / "c" / "packed").iterdir())
    assert len(files) == 4
    with monkeypatch.context() as patch:
        patch.setattr("trimtab.data.feed.pack", lambda *_: 1 / 0)
        assert [epoch(0), epoch(1), epoch(0, seed=2), epoch(0, tokens=12)] == made
    for file in files:
        file.write_bytes(file.read_bytes()[:-5])  # torn: packed anew
    assert [epoch(0), epoch(1)] == made[:2]
