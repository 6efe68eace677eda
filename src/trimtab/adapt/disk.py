"""Files on disk: whole folders written at once, and safetensors and JSON read with errors people can act on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import FileFormatError, StorageError

WHOLE = frozenset({"adapter_config.json", "trimtab.json", "state.json"})
"""A folder that holds one of these is ours to replace."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on CPU."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise FileFormatError(
            f"{file} is not a whole safetensors file ({error}); it is torn or foreign."
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{file} is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise FileFormatError(f"{file} holds a {type(data).__name__}, not an object.")
    return data


def checksum(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    header = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(header + flat.numpy().tobytes()).hexdigest()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block ends without an error.

    Raises:
        StorageError: the disk refused; the temporary folder is removed and ``folder`` is as it was.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        mode = 0o666 & ~_umask()
        for file in temporary.iterdir():
            if file.is_file():
                file.chmod(mode)  # as an ordinary write would leave it; temporary files are private
            _flush(file)
        temporary.chmod(mode | (mode & 0o444) >> 2)  # who may read a folder may enter it
        _flush(temporary)
        _swap(temporary, folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"could not write {folder}: {error}. What was saved there before is intact; free space or choose "
            "another folder, and save again."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def placing(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files take their places in ``folder``, beside what else lies there.

    Each file is whole or the old one. A crash between two of them leaves files whose checksums do not fit.

    Raises:
        StorageError: the disk refused, or something that is no file is in the way; all is as it was.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; name a folder to write into.")
    temporary: Path | None = None
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new.", dir=folder))
        yield temporary
        mode = 0o666 & ~_umask()
        files = sorted(temporary.iterdir(), reverse=True)  # trimtab.json first
        for file in files:
            file.chmod(mode)
            _flush(file)
            if (folder / file.name).is_dir():
                raise StorageError(
                    f"{folder / file.name} is a folder, in the way of a file of that name; remove it, or choose "
                    "another folder."
                )
        _take_places(files, folder)
        _flush(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()  # only where it is empty
        if isinstance(error, StorageError) or not isinstance(error, OSError | SafetensorError):
            raise
        raise StorageError(
            f"could not write into {folder}: {error}. What was there before is intact; free space or choose another "
            "folder, and save again."
        ) from error
    else:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_places(files: Sequence[Path], folder: Path) -> None:
    """Move files into a folder: all of them, or, if the disk refuses one, none."""
    aside: dict[Path, Path | None] = {}
    try:
        for file in files:
            target = folder / file.name
            kept = file.with_name(f"{file.name}.old") if target.exists() else None
            if kept is not None:
                _also(target, kept)
            aside[target] = kept
            os.replace(file, target)
    except BaseException:
        for target, kept in aside.items():
            if kept is not None:
                os.replace(kept, target)
            else:
                target.unlink(missing_ok=True)
        raise


def _also(file: Path, other: Path) -> None:
    """A second name for a file's content; a copy, where the file system knows no second names."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


def _swap(temporary: Path, folder: Path) -> None:
    """Rename into place. An old folder steps aside first and comes back if the rename fails."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    if folder.is_file() or not (WHOLE & {p.name for p in folder.iterdir()} or _empty(folder)):
        raise StorageError(
            f"{folder} exists and is not an adapter folder; it is not overwritten. Choose another."
        )
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent)) / folder.name
    os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    shutil.rmtree(aside.parent, ignore_errors=True)


def _umask() -> int:
    """The process's umask; reading it means setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write an object with sorted keys, so that equal values are equal files."""
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
