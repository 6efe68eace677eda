"""Pages are nobody's twice, and what is found holds exactly what is looked for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.engine.serve.ledger import Ledger

SIZE, PAGES = 4, 9
texts = st.lists(st.integers(0, 1), min_size=1, max_size=20)
steps = st.lists(
    st.tuples(st.sampled_from(["open", "close", "forget"]), st.sampled_from("ab"), texts, st.integers(0, 9)),
    max_size=30,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(steps)
def test_readers_and_contents(steps: list[tuple[str, str, list[int], int]]) -> None:
    ledger = Ledger(PAGES, SIZE)
    holds: dict[int, tuple[str, tuple[int, ...]]] = {}  # page -> what its writer put there
    readers: list[list[int]] = []
    for what, root, text, number in steps:
        if what == "open":
            found = ledger.find(root, text)
            for place, page in enumerate(found):
                assert holds[page] == (root, tuple(text[: (place + 1) * SIZE]))
            assert len(found) * SIZE < len(text)
            ledger.share(found)
            more = -(-len(text) // SIZE) - len(found)
            if more > ledger.room:
                ledger.release(found)
                continue
            pages = found + ledger.take(more)
            for place in range(len(found), len(text) // SIZE):
                holds[pages[place]] = root, tuple(text[: (place + 1) * SIZE])
            ledger.keep(root, text, pages)
            readers.append(pages)
        elif what == "close" and readers:
            ledger.release(readers.pop(number % len(readers)))
        elif what == "forget":
            ledger.forget()
        assert ledger.read == len({page for pages in readers for page in pages})
        for pages in readers:
            assert len(set(pages)) == len(pages)
    for pages in readers:
        ledger.release(pages)
    assert ledger.room == PAGES
    assert sorted(ledger.take(PAGES)) == list(range(PAGES))


def test_another_root_finds_nothing() -> None:
    ledger = Ledger(PAGES, SIZE)
    text = list(range(10))
    pages = ledger.take(3)
    ledger.keep("a", text, pages)
    ledger.release(pages)
    assert ledger.find("a", text) == pages[:2]
    assert ledger.find("b", text) == []
    assert ledger.find("a", [*text[:4], 7, *text[5:]]) == pages[:1]
    assert ledger.find("a", text[:8]) == pages[:1]  # one token at least is read anew


def test_the_end_of_the_text_left_longest_ago_goes_first() -> None:
    ledger = Ledger(4, SIZE)
    first, second = ledger.take(2), ledger.take(2)
    ledger.keep("a", list(range(8)), first)
    ledger.keep("b", list(range(8)), second)
    ledger.release(first)
    ledger.release(second)
    assert ledger.take(1) == [first[1]]
    assert ledger.find("a", list(range(9))) == first[:1]
    assert ledger.find("b", list(range(9))) == second
