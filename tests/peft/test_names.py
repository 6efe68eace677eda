"""The table of names in ``docs/from-peft.md`` is what the two packages are."""

from __future__ import annotations

from tests.peft.names import PAGE, Reasons, page, written

MEND = "see: python -m tests.peft.names, and --write"


def test_every_name_that_is_not_there_has_a_reason() -> None:
    _, unsaid, unused = written()
    assert unsaid == (), MEND
    assert unused == (), MEND


def test_the_page_is_made_of_what_is_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, written()[0]) == text, MEND


def test_reasons_are_words() -> None:
    reasons = Reasons()
    for why in (*reasons.lacks.values(), *reasons.differs.values()):
        assert len(why.split()) >= 3 and not why.endswith("."), why
