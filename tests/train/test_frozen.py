"""Runs that keep the hidden states below their adapter on disk: the same result, said, checked and resumed."""

from __future__ import annotations

import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train import kit
from trimtab.engine.frozen import hidden_cache
from trimtab.engine.states import StateFiles
from trimtab.errors import StorageError, UnsupportedError
from trimtab.train import frozen as frozen_file
from trimtab.train.events import read_events

TOP = {"kind": "lora", "rank": 2, "dropout": 0.1, "layers": [-1]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(home: Path, name: str, frozen: str = "cache", **options: Any) -> Any:
    return kit.recipe(home, name, **{"method": TOP, "memory__frozen": frozen, **options})


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def said(folder: Path) -> str:
    (start,) = [e for e in read_events(folder / "events.jsonl") if e["event"] == "start"]
    return next((text for name, text in start["plan"] if name == frozen_file.NAME), "")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The texts whose states are written."""
    found: list[bytes] = []
    add = StateFiles.add

    def note(self: StateFiles, key: bytes, states: Tensor) -> None:
        found.append(key)
        add(self, key, states)

    monkeypatch.setattr(StateFiles, "add", note)
    return found


def test_a_run_ends_as_one_that_computes_all(home: Path, added: list[bytes]) -> None:
    plain = kit.go(recipe(home, "plain", "none"))
    kept = kit.go(recipe(home, "kept"))
    assert added
    assert len(added) == len(set(added)), "each text once, of both epochs and all measurements"
    for step, other in zip(kit.steps_of(plain.folder), kit.steps_of(kept.folder), strict=True):
        assert step == pytest.approx(other, rel=1e-3)
    want, got = tensors(plain.folder), tensors(kept.folder)
    for name, tensor in want.items():
        assert (tensor - got[name]).norm() <= 1e-3 * tensor.norm(), name
    assert said(plain.folder) == ""
    assert "the first 1 of 2 are computed once" in said(kept.folder)


def test_the_next_run_writes_nothing_and_says_so(home: Path, added: list[bytes]) -> None:
    kit.go(recipe(home, "one"))
    count = len(added)
    other = kit.go(recipe(home, "two", optim__lr=1e-3, method={**TOP, "rank": 4}))
    assert len(added) == count
    assert f"{count:,} texts are there already; 0 bytes of" in said(other.folder)
    assert len(list(hidden_cache().iterdir())) == 1


def test_stopped_in_the_first_epoch_it_goes_on_from_what_is_there(
    home: Path, added: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kit.go(recipe(home, "whole"))
    count = len(added)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with kit.at_step(3, lambda run: signal.raise_signal(signal.SIGINT)):
        stopped = kit.go(recipe(home, "stopped"))
    assert stopped.status == "interrupted"
    first = len(added) - count
    done = kit.go(recipe(home, "stopped"), resume=True)
    assert done.status == "finished"
    assert 0 < first < count
    assert len(added) == 2 * count, "what was written is not computed again"
    want, got = tensors(whole.folder), tensors(done.folder)
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())


def test_auto_keeps_where_it_pays_and_says_why_not(home: Path) -> None:
    assert "computed once" in said(kit.go(recipe(home, "twice", "auto")).folder)
    once = kit.go(recipe(home, "once", "auto", epochs=1))
    assert said(once.folder) == "computed each time: no example is seen twice"
    low = kit.go(recipe(home, "low", "auto", method="lora(rank=2)"))
    assert said(low.folder).startswith("computed each time: memory.frozen: lora acts in the first")


def test_what_cannot_be_is_an_error_before_the_run(home: Path) -> None:
    with pytest.raises(UnsupportedError, match="memory.frozen: prefix puts tokens before the text"):
        kit.go(kit.recipe(home, "prefix", method="prefix(length=2)", memory__frozen="cache"))
    with pytest.raises(UnsupportedError, match="stream"):
        kit.go(recipe(home, "stream", data__stream=True, steps=3))
    assert not (home / "stream").exists()


def test_a_disk_without_room_is_an_error_before_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 512, 512))
    with pytest.raises(StorageError, match=r"take .* MiB, and 512 bytes are free"):
        kit.go(recipe(home, "full"))
    assert "computed each time: memory.frozen: the hidden states" in said(
        kit.go(recipe(home, "auto", "auto")).folder
    )


def test_damaged_states_are_computed_again(home: Path, added: list[bytes]) -> None:
    kit.go(recipe(home, "one"))
    count = len(added)
    (folder,) = hidden_cache().iterdir()
    (file,) = folder.glob("*.states")
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content[:-1])
    done = kit.go(recipe(home, "two"))
    assert done.status == "finished"
    assert len(added) > count
    want, got = tensors(home / "one"), tensors(home / "two")
    for name, tensor in want.items():
        assert (tensor - got[name]).norm() <= 1e-3 * tensor.norm(), name
