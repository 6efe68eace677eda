"""Adapters of a `PeftModel` in folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.files import save
from trimtab.peft.config import PeftConfig
from trimtab.peft.hub import local_adapter
from trimtab.peft.state import gathered

if TYPE_CHECKING:
    from trimtab.peft.tuner import Tuner


def read_folder(
    place: str | Path,
    name: str,
    trainable: bool,
    *,
    config: PeftConfig | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> tuple[PeftConfig, Adapter]:
    """The configuration and the adapter of a folder, or of a repository."""
    folder = local_adapter(place, subfolder, **hub)
    found = PeftConfig.from_pretrained(folder) if config is None else config.copied()
    found.inference_mode = not trainable
    return found, Adapter.load(folder, name=name)


def write_folder(
    tuner: Tuner, name: str, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write an adapter beside what else lies in a folder; ``state`` holds its tensors where they are sharded."""
    adapter, config = tuner.require(name), tuner.peft_config[name]
    adapter.origin = replace(
        adapter.origin,
        base_name=config.base_model_name_or_path or adapter.origin.base_name,
        task_type=config.task_type or adapter.origin.task_type,
    )
    if state is not None:
        adapter = _from_state(adapter, tuner.model, state)
    save(adapter, folder, beside=True)


def _from_state(adapter: Adapter, root: nn.Module, state: Mapping[str, Tensor]) -> Adapter:
    """An adapter with the tensors of a state dict of its model."""
    found = gathered(adapter, root, state)
    copy = Adapter(
        adapter.name, adapter.method, adapter.sites, found, base=adapter.base, origin=adapter.origin
    )
    copy.drawn = dict(adapter.drawn)
    return copy
