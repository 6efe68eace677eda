"""Files of a folder, or of a repository on the hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.errors import FileFormatError, StorageError, UnknownNameError

_OPTIONS = ("revision", "cache_dir", "force_download", "token", "local_files_only", "proxies")


def local_file(place: str | Path, name: str, subfolder: str | None = None, **options: Any) -> Path:
    """The path of a file of a folder, or of a repository, fetched if need be.

    Raises:
        FileFormatError: the folder, or the repository, has no such file.
        StorageError: the hub could not be reached.
    """
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise UnknownNameError(f"unknown option {unknown[0]!r}. Known: {', '.join(_OPTIONS)}.")
    folder = Path(place)
    if folder.is_dir():
        file = folder / (subfolder or "") / name
        if not file.is_file():
            raise FileFormatError(f"{file.parent} has no {name}: not an adapter folder.")
        return file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(str(place), name, subfolder=subfolder, **options))
    except HFValidationError as error:
        raise FileFormatError(
            f"{place} is neither a folder nor the name of a repository on the hub."
        ) from error
    except EntryNotFoundError as error:
        raise FileFormatError(f"{place}: the hub has no {name} there ({error}).") from error
    except (HfHubHTTPError, OSError) as error:
        raise StorageError(
            f"{place}: {name} could not be fetched from the hub: {error}."
        ) from error


def local_adapter(place: str | Path, subfolder: str | None = None, **options: Any) -> Path:
    """The folder of an adapter, fetched if need be."""
    config = local_file(place, "adapter_config.json", subfolder, **options)
    if not Path(place).is_dir():
        local_file(place, "adapter_model.safetensors", subfolder, **options)
        with suppress(FileFormatError):  # PEFT writes none
            local_file(place, "trimtab.json", subfolder, **options)
    return config.parent
