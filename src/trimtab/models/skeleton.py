"""The shape of a model without its weights: built from its config alone, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from trimtab.errors import ModelError


def skeleton(source: str | Path) -> nn.Module:
    """The model of a folder, or of a ``config.json``; nothing is read but that file, and no weight is allocated.

    Raises:
        ModelError: there is no such file, or transformers has no such model.
    """
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"{str(source)!r} is neither a folder with a config.json nor such a file; to learn a method's size, "
            "download the config of the model."
        )
    try:
        config = AutoConfig.from_pretrained(file)
        return built(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{str(file)!r} describes no model that can be built: {text[0]}"
        ) from error


def built(config: Any) -> nn.Module:
    """The model of a config of transformers, with the head that the config names."""
    names = [name for name in config.architectures or () if name in dir(transformers)]
    with torch.device("meta"):
        if not names:
            headless: nn.Module = AutoModel.from_config(config)
            return headless
        model: nn.Module = getattr(transformers, names[0])(config)
        return model
