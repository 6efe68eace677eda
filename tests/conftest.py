"""Settings of every test process, made before torch is imported.

Two processes share the cores, so each computes on one thread; nothing asks a model hub; and
hypothesis draws the same examples in every run, so that a failure can be repeated. What is tokenised goes to
a cache of this process alone.
"""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="trimtab-test-")

import pytest
from hypothesis import settings

from recipes import assets

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
settings.register_profile("trimtab", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("trimtab")


def pytest_collection_finish() -> None:
    """What was imported stays: the collector of garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct; the test is skipped where it cannot be fetched."""
    try:
        return assets.smollm2()
    except assets.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2; the test is skipped where it cannot be fetched."""
    try:
        return assets.minilm()
    except assets.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the documentation's names of a model and of a data file exist."""
    from tests.train import kit

    kit.model_folder(tmp_path / "SmolLM2-135M-Instruct")
    kit.data_file(tmp_path / "tickets.jsonl", 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path
