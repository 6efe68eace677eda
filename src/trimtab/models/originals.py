"""Dense weights of a checkpoint on disk, by the paths of a model's modules; each is read when it is asked for.

A base that is stored in few bits has lost something, and what it was lies in the checkpoint that it was loaded from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from trimtab.errors import ModelError


class Originals:
    """The safetensors files of a folder, or of a repository that was downloaded before."""

    def __init__(self, source: str | Path, prefix: str = "") -> None:
        """``prefix`` is the name of the model inside the model, which a checkpoint may leave out.

        Raises:
            ModelError: there are no such files.
        """
        self.source, self._prefix = source, prefix
        path = Path(source)
        alone = path.suffix == ".safetensors" and path.is_file()
        files = [path] if alone else sorted(_folder(source).glob("*.safetensors"))
        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        if not self._files:
            raise ModelError(
                f"{source} holds no safetensors files, so the dense weights of this base cannot be read; pass "
                "weights= with the folder that does."
            )

    def weight(self, path: str) -> Tensor:
        """The weight of the module at a path, as the checkpoint has it.

        Raises:
            ModelError: it is not there, or is in few bits there, too.
        """
        bare = path.removeprefix(f"{self._prefix}.") if self._prefix else path
        for name in (path, bare, f"{self._prefix}.{path}"):
            if (file := self._files.get(f"{name}.weight")) is not None:
                with safe_open(file, framework="pt") as opened:
                    found: Tensor = opened.get_tensor(f"{name}.weight")
                if not found.is_floating_point():
                    raise ModelError(f"{self.source}: {name}.weight is in few bits there, too.")
                return found
        raise ModelError(
            f"{self.source} has no tensor {path}.weight, so what {path!r} was before it was stored in few bits is not "
            "known."
        )


class WeightOnDisk(Mapping[str, Tensor]):
    """What is observed of one layer: its ``original`` weight, read each time it is asked for."""

    def __init__(self, originals: Originals, path: str) -> None:
        self._originals, self._path = originals, path

    def __getitem__(self, key: str) -> Tensor:
        if key != "original":
            raise KeyError(key)
        return self._originals.weight(self._path)

    def __iter__(self) -> Iterator[str]:
        return iter(("original",))

    def __len__(self) -> int:
        return 1


def _folder(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix == ".safetensors":  # of a file that became several
        path = path.parent
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        raise ModelError(
            f"{str(source)!r} is no folder and no repository that was downloaded, so the dense weights of this base "
            "cannot be read; pass weights= with the folder that holds them."
        ) from None
