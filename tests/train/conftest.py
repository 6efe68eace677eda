from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train import kit


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, 24 training rows and 12 held-out ones."""
    folder = tmp_path_factory.mktemp("job")
    kit.model_folder(folder / "model")
    kit.data_file(folder / "train.jsonl", 24)
    kit.data_file(folder / "held.jsonl", 12, seed=1)
    return folder


@pytest.fixture
def home(job: Path, tmp_path: Path) -> Path:
    """The same, to write into."""
    for name in ("train.jsonl", "held.jsonl"):
        shutil.copy(job / name, tmp_path / name)
    (tmp_path / "model").symlink_to(job / "model")
    return tmp_path
