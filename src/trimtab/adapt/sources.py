"""Where an adapter lies on disk while it waits, and how it comes from there.

A folder is looked into whole once, when it is registered. Loading it later is one look at what the files are (the same
as then, or it is refused) and a copy of the tensors out of their memory map: what is checked once is not checked again.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.files import CONFIG, OURS, WEIGHTS
from trimtab.adapt.fit import Fit, Forms
from trimtab.adapt.packed import Packed
from trimtab.errors import FileFormatError

Read = Callable[[Forms], Packed]
"""What was read of an adapter; called by the thread that runs the model, it gives the adapter."""


class Source(ABC):
    """The folder of one adapter. Abstract."""

    files: tuple[str, ...]
    """Those that make it up, by their paths in the folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._state: tuple[object, ...] | None = None

    @abstractmethod
    def check(self, forms: Forms) -> Packed:
        """Look into the folder whole; `read` gives this from now on, as long as the files stay.

        Raises:
            FileFormatError: it is not a whole one.
            AttachError, TargetError, UnsupportedError: the adapter does not fit the model.
        """

    @abstractmethod
    def read(self) -> Read:
        """The adapter again; on any thread, as the model is not looked at before `Read` is called.

        Raises:
            FileFormatError: the files are torn, or not those that were checked.
        """

    @abstractmethod
    def write(self, name: str, packed: Packed) -> None:
        """Put an adapter into the folder, in the place of what it holds. Raises `StorageError`."""

    def note(self) -> None:
        """The files as they are now are those to be read."""
        self._state = self._look()

    def same(self) -> None:
        """Raise `FileFormatError` where the files are others than `note` saw."""
        if self._look() != self._state:
            raise FileFormatError(
                f"{self.folder} was changed since its adapter was registered; forget the adapter and register it again."
            )

    def _look(self) -> tuple[object, ...]:
        """What tells one state of the files from another."""
        found: list[object] = []
        for file in self.files:
            try:
                seen = os.stat(f"{self.folder}/{file}")
            except FileNotFoundError:
                found.append(None)
            except OSError as error:
                raise FileFormatError(f"{self.folder}/{file} cannot be read: {error}.") from error
            else:
                found.append((seen.st_ino, seen.st_size, seen.st_mtime_ns))
        return tuple(found)


@final
class AdapterFolder(Source):
    """An adapter folder, ours or PEFT's (`trimtab.adapt.files`), of which copies to answer with are made."""

    files = (CONFIG, WEIGHTS, OURS)

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._plain: Fit | None = None
        """Known where the file holds just the tensors of the form, each at its key."""

    def check(self, forms: Forms) -> Packed:
        self.note()
        adapter = Adapter.load(self.folder)
        packed = forms.serving(adapter)
        fit = None if adapter.origin.rebuilt else forms.fit(adapter)
        self._plain = fit if fit is not None and self._holds(fit, packed) else None
        self.same()
        return packed

    def read(self) -> Read:
        self.same()
        if self._plain is None:
            adapter = Adapter.load(self.folder)
            return lambda forms: forms.serving(adapter)
        packed = self._copied(self._plain)
        return lambda forms: packed

    def write(self, name: str, packed: Packed) -> None:
        packed.adapter(name).save(self.folder)
        self.note()
        self._plain = None

    def _holds(self, fit: Fit, packed: Packed) -> bool:
        """Whether copying the tensors at these keys gives the very bytes of the adapter."""
        try:
            return torch.equal(self._copied(fit).piece, packed.piece)
        except (FileFormatError, RuntimeError):  # other keys, or other shapes
            return False

    def _copied(self, fit: Fit) -> Packed:
        file = f"{self.folder}/{WEIGHTS}"
        try:
            with safe_open(file, framework="pt") as opened:
                piece = fit.form.layout.pack(opened.get_tensor(key) for key in fit.keys)
        except (SafetensorError, OSError) as error:
            raise FileFormatError(
                f"{file} is gone, or no whole safetensors file ({error}); restore it, or forget its adapter."
            ) from error
        return Packed(fit.form, piece)
