"""Tokenise a source once: the result lies in a cache, named by a hash of everything that it depends on.

The name covers the content of the source and of the user's functions, the tokenizer, the chat template, what is
trained and how examples are limited; how they are packed into steps is kept beside them. So nothing in the cache
can be out of date, and a source whose content cannot be told beforehand (a stream of Python's) is tokenised anew
each time. What was not used for a month is removed when something is written.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from trimtab.adapt.disk import replacing
from trimtab.data.corpus import Portion
from trimtab.data.examples import ExampleConfig, Outcomes, read_examples, whole
from trimtab.data.render import Renders
from trimtab.data.source import Source
from trimtab.data.token_file import META, SCHEMA, TokenFile, TokenWriter
from trimtab.errors import FileFormatError

MONTH = 30 * 86400.0
PACKED = "packed"
"""The folder in the cache for how examples were packed into steps."""
Progress = Callable[[int, int | None], None]


def token_cache() -> Path:
    """The folder of tokenised sources: ``trimtab/tokens`` in the user's cache folder (``$XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "tokens"


def tokenise(
    source: Source,
    renderer: Renders,
    config: ExampleConfig,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Portion, Outcomes]:
    """All examples of ``source``, tokenised now or found in the cache; and what became of its rows.

    Args:
        folder: where to keep them; None is `token_cache`.
        progress: called with (rows done, rows in all or None).

    Raises:
        DataError: one error for all rows that are errors by ``config``; nothing is kept then.
        StorageError: the disk refused.
    """
    if not source.certain:
        return _uncached(source, renderer, config, progress)
    digest = _name(source, renderer, config)
    target = (folder or token_cache()) / digest
    file = _open(target)
    if file is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            file = _open(target)
            if file is None:
                shutil.rmtree(target, ignore_errors=True)
                _write(target, source, renderer, config, progress)
                file = TokenFile(target)
        Path(f"{target}.lock").unlink(missing_ok=True)
        _forget_old(target.parent)
    with suppress(OSError):  # a cache that others keep, and this process only reads
        os.utime(target / META)
    return _portion(file, source, digest), Outcomes.of(file.facts["outcomes"])


def _uncached(
    source: Source, renderer: Renders, config: ExampleConfig, progress: Progress | None
) -> tuple[Portion, Outcomes]:
    """In a folder that goes with the process; named by what was found in the source."""
    scratch = Path(tempfile.mkdtemp(prefix="trimtab-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _write(scratch / "tokens", source, renderer, config, progress)
    file = TokenFile(scratch / "tokens")
    return _portion(file, source, file.digest()), Outcomes.of(file.facts["outcomes"])


def _portion(file: TokenFile, source: Source, digest: str) -> Portion:
    return Portion(file, np.arange(len(file), dtype=np.int64), source.name, digest)


def _name(source: Source, renderer: Renders, config: ExampleConfig) -> str:
    parts = (str(SCHEMA), source.digest, renderer.fingerprint(), config.model_dump_json())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _open(target: Path) -> TokenFile | None:
    if not target.is_dir():
        return None
    try:
        return TokenFile(target)
    except FileFormatError:  # of an older version, or torn by a full disk: it is made again
        return None


def _write(
    target: Path,
    source: Source,
    renderer: Renders,
    config: ExampleConfig,
    progress: Progress | None,
) -> None:
    outcomes = Outcomes(config)
    with replacing(target) as temporary, TokenWriter(temporary) as writer:
        for example in whole(read_examples(source, renderer, outcomes), source, outcomes):
            writer.add(example.datum, example.key)
            if progress is not None:
                progress(outcomes.read, source.count)
        writer.close({"name": source.name, "content": source.digest, "outcomes": outcomes.fields()})


def kept_lists(path: Path, make: Callable[[], list[list[int]]]) -> list[list[int]]:
    """Lists of numbers as they were kept in ``path``; else made now, and kept where the disk allows."""
    with suppress(OSError, ValueError, EOFError):
        flat = np.load(path, allow_pickle=False)
        ends = flat[1 : flat[0] + 1]
        os.utime(path)
        return [part.tolist() for part in np.split(flat[flat[0] + 1 :], ends[:-1])]
    lists = make()
    ends = np.cumsum([len(one) for one in lists])
    flat = np.concatenate([[len(lists)], ends, *lists]).astype("<i8")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.npy")
        np.save(partial, flat)
        partial.replace(path)
    return lists


def _forget_old(folder: Path) -> None:
    for file in (folder / PACKED).glob("*.npy"):
        if time.time() - file.stat().st_mtime > MONTH:
            file.unlink(missing_ok=True)
    for entry in folder.iterdir():
        meta = entry / META
        if meta.is_file() and time.time() - meta.stat().st_mtime > MONTH:
            shutil.rmtree(entry, ignore_errors=True)
