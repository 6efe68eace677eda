"""Files of a folder, or of a repository on the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trimtab.errors import FileFormatError, StorageError, UnknownNameError

OPTIONS = ("revision", "cache_dir", "force_download", "token", "local_files_only", "proxies")


def local_file(place: str | Path, name: str, subfolder: str | None = None, **options: Any) -> Path:
    """The path of a file of a folder, or of a repository, fetched if need be.

    Raises:
        FileFormatError: the folder, or the repository, has no such file.
        StorageError: the hub could not be reached.
    """
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        raise UnknownNameError(f"unknown option {unknown[0]!r}. Known: {', '.join(OPTIONS)}.")
    folder = Path(place)
    if folder.is_dir():
        file = folder / (subfolder or "") / name
        if not file.is_file():
            raise FileFormatError(f"{file.parent} has no {name}: not an adapter folder.")
        return file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(str(place), name, subfolder=subfolder, **options))
    except HFValidationError as error:
        raise FileFormatError(
            f"{place} is neither a folder nor the name of a repository on the hub."
        ) from error
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but nobody was asked
        raise StorageError(
            f"{place}: {name} is not in the cache, and the hub could not be asked: {error}"
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
        optional_file(place, "trimtab.json", subfolder, **options)  # PEFT writes none
    return config.parent


def optional_file(
    place: str | Path, name: str, subfolder: str | None = None, **options: Any
) -> Path | None:
    """As `local_file`; None where there is none, or where only the cache may be asked and lacks it."""
    from huggingface_hub.constants import is_offline_mode

    try:
        return local_file(place, name, subfolder, **options)
    except FileFormatError:
        return None
    except StorageError:
        if is_offline_mode() or options.get("local_files_only"):
            return None
        raise


def push(
    save: Callable[[Path], Any],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | Sequence[str] | None = None,
) -> Any:
    """Write files by ``save`` and commit them to a repository, which is made where there is none.

    Raises:
        StorageError: the hub refused, or could not be reached; nothing on disk is lost by it.
    """
    from huggingface_hub import HfApi, ModelCard, ModelCardData

    api = HfApi()
    with TemporaryDirectory() as temporary:
        folder, card = Path(temporary), Path(temporary) / "README.md"
        save(folder)
        if tags:
            made = (
                ModelCard.load(card) if card.exists() else ModelCard.from_template(ModelCardData())
            )
            added = [tags] if isinstance(tags, str) else list(tags)
            made.data.tags = list(dict.fromkeys([*(made.data.tags or []), *added]))
            made.save(card)
        try:
            name = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(name, branch=revision, token=token, exist_ok=True)
            return api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=commit_message, token=token, revision=revision,
                commit_description=commit_description, create_pr=create_pr,
            )  # fmt: skip
        except Exception as error:  # of whichever library carries HTTP for the hub's client
            raise StorageError(f"{repo_id} could not be pushed to the hub: {error}.") from error
