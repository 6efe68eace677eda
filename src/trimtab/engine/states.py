"""Hidden states of texts on disk, read through memory maps.

A folder belongs to one base, cut at one block (`trimtab.engine.frozen` names it by what its content depends on). Each
process that adds to it writes a pair of files of its own, so that no two ever write to one:

    <name>.states   the states of one text after the other, each (T, C) in the base's dtype
    <name>.index    one entry of 36 bytes for each: key, place, tokens, and the checksums of states and entry
    meta.json       width and dtype

States come before their entry. So whatever is torn (by a crash, or a full disk) is an entry that is short, or that
points behind the end, or whose checksum does not fit: it counts as missing, and is computed again.

Shapes: T tokens, C the width of the hidden states.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.adapt.disk import read_json, write_json
from trimtab.data.tokenise import MONTH
from trimtab.errors import FileFormatError, StorageError

SCHEMA = 1
META = "meta.json"
ENTRY = struct.Struct("<16sQII")
WHOLE = ENTRY.size + 4
Key = bytes


def key_of(tokens: Sequence[int]) -> Key:
    """The name of a text: 16 bytes that depend on its tokens alone."""
    return hashlib.blake2b(np.asarray(tokens, "<i8").tobytes(), digest_size=16).digest()


class Place(NamedTuple):
    """Where the states of a text lie."""

    file: Path
    start: int
    tokens: int
    checksum: int


class StateFiles:
    """What lies in a folder, and one writer to it.

    Args:
        folder: made if it is not there.
        width, dtype: of the hidden states.
        note: told in a sentence what is torn, and when the disk refuses.

    Raises:
        StorageError: the folder cannot be made.
        FileFormatError: it holds something else.
    """

    def __init__(
        self, folder: Path, width: int, dtype: torch.dtype, note: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.row = width * dtype.itemsize
        """Bytes of one token."""
        self._note = note
        self._places: dict[Key, list[Place]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._checked: set[Place] = set()
        self._writer: _Writer | None = None
        self._full = False
        self._open({"schema": SCHEMA, "width": width, "dtype": str(dtype).removeprefix("torch.")})

    def _open(self, meta: dict[str, object]) -> None:
        file = self.folder / META
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if file.is_file() and read_json(file) != meta:
                raise FileFormatError(f"{self.folder} holds no such hidden states; remove it.")
            if not file.is_file():
                partial = self.folder / f".{META}.{os.getpid()}"
                write_json(partial, meta)
                partial.replace(file)
            with suppress(OSError):  # a cache that others keep, and this process only reads
                os.utime(file)
        except OSError as error:
            raise StorageError(f"cannot keep hidden states in {self.folder}: {error}.") from error
        torn = sum(self._read(index) for index in sorted(self.folder.glob("*.index")))
        if torn:
            self._note(
                f"{torn} of the hidden states in {self.folder} are torn; they are computed again."
            )

    def _read(self, index: Path) -> int:
        """Take up the entries of a file; how many are torn."""
        states = index.with_suffix(".states")
        size = states.stat().st_size if states.is_file() else 0
        content = index.read_bytes()
        torn = int(len(content) % WHOLE > 0)
        for start in range(0, len(content) - WHOLE + 1, WHOLE):
            entry = content[start : start + ENTRY.size]
            key, place, tokens, checksum = ENTRY.unpack(entry)
            (own,) = struct.unpack_from("<I", content, start + ENTRY.size)
            if own != zlib.crc32(entry) or place + tokens * self.row > size:
                torn += 1
            else:
                self._places.setdefault(key, []).append(Place(states, place, tokens, checksum))
        return torn

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    # -- reading -------------------------------------------------------------------------------------

    def get(self, key: Key, tokens: int) -> NDArray[np.uint8] | None:
        """The bytes (T, C · itemsize) of a text's states; None where they are not there, or damaged."""
        places = self._places.get(key, [])
        while places:
            found = self._bytes(places[-1], tokens)
            if found is not None:
                return found
            damaged = places.pop()
            self._note(
                f"hidden states of a text in {damaged.file} are damaged; they are computed again."
            )
        self._places.pop(key, None)
        return None

    def _bytes(self, place: Place, tokens: int) -> NDArray[np.uint8] | None:
        end = place.start + place.tokens * self.row
        known = self._maps.get(place.file)
        if known is None or len(known) < end:
            try:
                with place.file.open("rb") as file:
                    known = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # gone, or empty
                return None
            self._maps[place.file] = known
        if place.tokens != tokens or len(known) < end:
            return None
        found = np.frombuffer(known, np.uint8, end - place.start, place.start)
        if place not in self._checked:
            if zlib.crc32(found.data) != place.checksum:
                return None
            self._checked.add(place)
        return found.reshape(tokens, self.row)

    # -- writing -------------------------------------------------------------------------------------

    def add(self, key: Key, states_TC: Tensor) -> None:
        """Keep the states of a text, where the disk allows; if it refuses, no more are kept in this process."""
        if key in self._places or self._full:
            return
        content = states_TC.cpu().contiguous().view(torch.uint8).numpy()
        try:
            self._writer = self._writer or _Writer(self.folder)
            place = self._writer.add(key, content)
        except OSError as error:
            self._full = True
            self._note(
                f"{self.folder} takes no more hidden states ({error}); the others are computed each time."
            )
        else:
            self._places[key] = [place]
            self._checked.add(place)

    def missing(self, texts: Iterable[Sequence[int]]) -> int:
        """Bytes that the states of these texts will take, beside what is there."""
        new = {key: len(tokens) for tokens in texts if (key := key_of(tokens)) not in self}
        return sum(new.values()) * self.row

    def close(self) -> None:
        """Let go of the files."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None
        self._maps.clear()  # each is unmapped once nobody looks at it


class _Writer:
    """A new pair of files."""

    def __init__(self, folder: Path) -> None:
        name = secrets.token_hex(8)
        self._path = folder / f"{name}.states"
        self._states: BinaryIO = self._path.open("xb", buffering=0)
        self._index: BinaryIO = (folder / f"{name}.index").open("xb", buffering=0)
        self._end = 0

    def add(self, key: Key, content: NDArray[np.uint8]) -> Place:
        place = Place(self._path, self._end, len(content), zlib.crc32(content.data))
        _write(self._states, content.reshape(-1).data)
        entry = ENTRY.pack(key, *place[1:])
        _write(self._index, memoryview(entry + struct.pack("<I", zlib.crc32(entry))))
        self._end += content.nbytes
        return place

    def close(self) -> None:
        self._states.close()
        self._index.close()


def _write(file: BinaryIO, content: memoryview) -> None:
    """All of it: a system may take it in parts."""
    while content:
        content = content[file.write(content) :]


def forget_old(root: Path) -> None:
    """Remove the folders that were not used for a month."""
    for meta in root.glob(f"*/{META}"):
        with suppress(OSError):
            if time.time() - meta.stat().st_mtime > MONTH:
                shutil.rmtree(meta.parent, ignore_errors=True)
