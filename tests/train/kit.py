"""A tiny model folder and a small job for it."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.data import kit as data_kit
from tests.engine import kit
from trimtab.train.api import train_recipe
from trimtab.train.events import read_events
from trimtab.train.recipe import Recipe
from trimtab.train.recipe_file import make_recipe
from trimtab.train.run import Outcome, Run
from trimtab.train.sweep.joined import Found, Joined, Wanted


def model_folder(path: Path) -> Path:
    """A model folder as `trimtab.load` reads it."""
    base = kit.base()
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


def rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """A question of three words whose answer is one of two; no row occurs twice."""
    draw = random.Random(seed)
    good, bad = (["sea", "ship", "deep", "turns", "fine"], ["not", "named", "two", "how", "lines"])
    made: dict[str, str] = {}
    while len(made) < count:
        answer = draw.choice(["yes", "no"])
        words = [draw.choice(good if answer == "yes" else bad) for _ in range(3)]
        made[f"{' '.join(words)} {seed}"] = answer
    return [{"prompt": prompt, "completion": answer} for prompt, answer in made.items()]


def data_file(path: Path, count: int, *, seed: int = 0) -> Path:
    return data_kit.write_jsonl(path, rows(count, seed=seed))


def recipe(home: Path, folder: str, **options: Any) -> Recipe:
    """24 steps of 4 examples on the files that the fixture ``home`` made; options by dotted name,
    with ``__`` for the dot."""
    values = {
        "model": str(home / "model"),
        "data": {"path": str(home / "train.jsonl"), "held_out": str(home / "held.jsonl")},
        "method": {"kind": "lora", "rank": 2, "dropout": 0.1},
        "dtype": "float32",
        "batch": {"size": 4},
        "optim": {"lr": 5e-3, "schedule": "cosine", "warmup": 2},
        "eval": {"every": 4, "samples": 2},
        "checkpoint": {"every": 3},
        "epochs": 2,
        "out": str(home / folder),
    }
    return make_recipe(values, {key.replace("__", "."): value for key, value in options.items()})


def go(recipe: Recipe, *, resume: bool = False) -> Outcome:
    return train_recipe(recipe, resume=resume, quiet=True)


@contextmanager
def at_step(number: int, action: Callable[[Run], Any]) -> Iterator[None]:
    """Do something when a run begins that step."""
    original = Run._computed

    def computed(self: Run, members: Any) -> Any:
        if self.progress.step + 1 == number:
            action(self)
        return original(self, members)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_computed", computed)
        yield


@contextmanager
def at_joined_step(number: int, action: Callable[[], Any]) -> Iterator[None]:
    """Do something when the variants begin that step together."""
    original = Joined.compute
    done = 0

    def compute(self: Joined, wanted: Sequence[Wanted]) -> Found:
        nonlocal done
        done += 1
        if done == number:
            action()
        return original(self, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Joined, "compute", compute)
        yield


def steps_of(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, norm) of the events that count."""
    return [
        (e["step"], e["loss"], e["grad_norm"])
        for e in read_events(folder / "events.jsonl")
        if e["event"] == "step"
    ]


def killed_after(
    seconds: float, work: Callable[[], Any], *, grown: tuple[Path, int] | None = None
) -> bool:
    """Do the work in a forked process and kill -9 it; whether it was still at work. With ``grown``, the
    seconds count from when it has added so many lines to that file, however slow the machine is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12: forking beside threads
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    ended = grown is not None and not _grows(*grown, child)
    if not ended:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _grows(path: Path, lines: int, child: int) -> bool:
    """Wait until a child has added so many lines; whether it did before it ended."""

    def count() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    least = count() + lines
    while count() < least:
        time.sleep(1e-3)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
    return True
