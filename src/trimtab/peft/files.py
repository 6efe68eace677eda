"""Adapters of a `PeftModel` in folders."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, Origin
from trimtab.adapt.files import TRAINING, save
from trimtab.errors import ConfigError
from trimtab.peft.config import PeftConfig
from trimtab.peft.encoded import ENCODER, has_encoder, shared_form, with_encoder, write_encoder
from trimtab.peft.errors import PeftWarning
from trimtab.peft.gathered import gathered, whole
from trimtab.peft.hub import local_adapter, optional_file
from trimtab.peft.types import on_disk

if TYPE_CHECKING:
    from trimtab.peft.tuner import Tuner


def read_folder(
    place: str | Path,
    name: str,
    trainable: bool,
    *,
    trained: bool = False,
    config: PeftConfig | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> tuple[PeftConfig, Adapter]:
    """The configuration and the adapter of a folder, or of a repository.

    ``trained`` asks for its encoder, as ``trainable`` does, where it is a prompt that one makes.
    """
    folder = local_adapter(place, subfolder, **hub)
    adapter = Adapter.load(folder, name=name)
    found = PeftConfig.from_pretrained(folder)
    if trainable or trained:
        optional_file(place, ENCODER, subfolder, **hub)
        shared, adapter = adapter, with_encoder(folder, adapter)
        if adapter is not shared:
            from trimtab.peft.configs.ours import config_of

            found = config_of(adapter.method.to_dict(), found.to_dict())
    if config is not None:
        _agree(config, found, folder)
        found = config.copied()
    found.inference_mode = not trainable
    return found, adapter


def compare_names(adapter: Adapter, model: nn.Module) -> None:
    """Warn where all that is known of an adapter's base is its name, and that is another than this model's."""
    made_for, present = adapter.origin.base_name, model.__dict__.get("name_or_path")
    if adapter.base is not None or not made_for or not present:
        return
    ends = {str(name).rstrip("/").rpartition("/")[2] for name in (made_for, present)}
    if len(ends) > 1:
        warnings.warn(
            f"adapter {adapter.name!r} was made for {made_for!r}, and this model is {present!r}. Its file says nothing "
            "of the weights it was made for, so they cannot be compared.",
            category=PeftWarning,
            stacklevel=3,
        )


def _agree(given: PeftConfig, found: PeftConfig, folder: Path) -> None:
    """Refuse a configuration that is not that of the file: the two are one adapter."""
    if type(given) is not type(found):
        raise ConfigError(
            f"config is a {type(given).__name__}, and {folder} holds a {type(found).__name__}."
        )
    mine, theirs = given.options(), found.options()
    for name, value in mine.items():
        if value != theirs[name] and (value or theirs[name]):
            raise ConfigError(
                f"config says {name}={value!r}, and {folder} {name}={theirs[name]!r}. An adapter is loaded as it was "
                "saved: leave config out, or pass PeftConfig.from_pretrained(folder)."
            )


def write_folder(
    tuner: Tuner, name: str, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write an adapter beside what else lies in a folder; ``state`` holds its tensors where they are sharded."""
    adapter, config = tuner.require(name), tuner.peft_config[name]
    # without a task, PEFT passes over prompts
    inferred = adapter.origin.task_type if adapter.method.peft_root == "base_model." else None
    origin = replace(
        adapter.origin,
        base_name=config.base_model_name_or_path or adapter.origin.base_name,
        task_type=config.task_type or inferred,
    )
    values = (
        {key: whole(tensor, key.key) for key, tensor in adapter.named().items()}
        if state is None
        else gathered(adapter, tuner.model, state)
    )
    written = Adapter(
        adapter.name, adapter.method, adapter.sites, values, base=adapter.base, origin=origin
    )
    written.drawn = dict(adapter.drawn)
    shared = shared_form(written, values)
    said = _said(config, origin, tuner.model)
    if has_encoder(written):
        own = {**shared.method.to_peft(shared.places()), "modules_to_save": None}
        told = {name: value for name, value in config.options().items() if name not in own}
        said = {**said, **told, "peft_type": on_disk(config.peft_type)}
        write_encoder(written, folder)
    save(shared, folder, beside=True, said=said)
    if not has_encoder(written):
        (folder / ENCODER).unlink(missing_ok=True)  # of an adapter that was here before


def _said(config: PeftConfig, origin: Origin, model: nn.Module) -> dict[str, Any]:
    """What PEFT writes beside the method's own options."""
    kind = type(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    said: dict[str, Any] = {
        "auto_mapping": None if origin.task_type else config.auto_mapping or mapping,
        "revision": config.revision,
    }
    options = config.options()
    if options.get("layer_replication"):
        said["layer_replication"] = options["layer_replication"]
    return said | {name: options[name] for name in TRAINING if options.get(name) is not None}
