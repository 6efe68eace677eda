"""Sides in processes that are forked from the test's, which has their libraries already."""

from __future__ import annotations

import os
import warnings
from typing import ClassVar

import pytest

from benchmarks import core, matmul, worker
from benchmarks.core import Side


class Forked:
    """As `benchmarks.core.started`, without the seconds that a new Python takes to import torch and its friends.

    The allocator is this process's own (`test_core` looks at started ones).
    """

    _ours: ClassVar[set[int]] = set()

    def __init__(self, side: Side, allocator: str, threads: int) -> None:
        questions, ask = os.pipe()
        hear, answers = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12: forking beside threads
            self._child = os.fork()
        if self._child == 0:
            self._serve(side, questions, answers, [ask, hear])
        os.close(questions)
        os.close(answers)
        self._code: int | None = None
        self._ends = {ask, hear}
        self._ours.update(self._ends)
        self.stdin = os.fdopen(ask, "w", encoding="utf-8")
        self.stdout = os.fdopen(hear, encoding="utf-8")

    def _serve(self, side: Side, questions: int, answers: int, others: list[int]) -> None:
        code = 1
        try:
            # or the sides that were forked before would not see the end of their questions
            for end in (*others, *self._ours):
                os.close(end)
            warnings.simplefilter("ignore")
            with os.fdopen(questions) as given, os.fdopen(answers, "w", encoding="utf-8") as said:
                code = worker.serve(side.target, dict(side.options), given, said)
        finally:
            os._exit(code)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
            self._ours.difference_update(self._ends)
        return self._code


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides are forked, not started; and what the machine can do at all is found out with small products."""
    monkeypatch.setattr(core, "started", Forked)
    monkeypatch.setattr(matmul, "SIZES", (64, 128))
