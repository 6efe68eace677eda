"""Arrow models, made as PEFT's users make them: several LoRAs of one base, among which each token chooses.

LoRAs that are added to the model later are not among them by themselves: delete ``arrow_router``, and add it again with
``LoraConfig(arrow_config=...)``, whose ``task_adapter_names`` say who is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import ConfigError
from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.configs.lora_parts import ArrowConfig
from trimtab.peft.model import PeftModel

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | Path],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | Path] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRAs as ``task_0``, ``task_1``, … and route each token among them by ``arrow_router``, which is active.

    Args:
        base_model: the base of all of them.
        task_specific_adapter_paths: their folders or repositories (``user/repo/folder`` too).
        arrow_config: how tokens choose; its ``task_adapter_names`` and ``gks_adapter_names`` are filled in.
        general_adapter_paths: LoRAs of general knowledge (``gks_0``, …), whose mean is taken out of each where
            ``use_gks``. The loaded LoRAs themselves stay as they are.
        adapter_kwargs: for loading.

    Raises:
        ConfigError: no folders, or LoRAs that differ in rank or in where they act.
        UnsupportedError: an adapter is no plain LoRA on linear layers.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("create_arrow_model needs at least one folder of a LoRA.")
    general = list(general_adapter_paths or []) if arrow_config.use_gks else []
    if arrow_config.use_gks and not general:
        raise ConfigError("use_gks=True needs general_adapter_paths.")
    tasks = [f"task_{number}" for number in range(len(task_specific_adapter_paths))]
    others = [f"gks_{number}" for number in range(len(general))]
    places = dict(zip([*tasks, *others], [*task_specific_adapter_paths, *general], strict=True))
    model: PeftModel | None = None
    for name, place in places.items():
        where, options = _placed(place, adapter_kwargs)
        if model is None:
            model = PeftModel.from_pretrained(base_model, where, adapter_name=name, **options)
        else:
            model.load_adapter(where, name, **options)
    if model is None:
        raise AssertionError("there is a folder")
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = tasks, others
    like = model.peft_config[tasks[0]]
    config = LoraConfig(
        arrow_config=arrow_config,
        target_modules=like.__dict__["target_modules"],
        r=like.__dict__["r"],
        task_type=like.task_type,
    )
    model.add_adapter(ROUTER, config)
    model.set_adapter(ROUTER)
    return model


def _placed(place: str | Path, options: dict[str, Any]) -> tuple[str | Path, dict[str, Any]]:
    """A folder; or a repository, and the folder in it."""
    parts = str(place).strip("/").split("/")
    if Path(place).is_dir() or len(parts) < 3 or "subfolder" in options:
        return place, options
    return "/".join(parts[:2]), {**options, "subfolder": "/".join(parts[2:])}
