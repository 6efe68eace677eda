"""Both sides of the face's oracles: the same tiny model with the same adapter values, in PEFT and in Trimtab."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import Tensor, nn

import trimtab.peft as face
from tests import tiny

IDS = torch.arange(3, 19).reshape(2, 8)
SAID = (
    "`is_gradient_checkpointing` is deprecated",
    "Adapter name .* should not be contained in the prefix",
    "Already found a `peft_config` attribute",
)


@contextmanager
def quiet(*messages: str) -> Iterator[None]:
    """Let PEFT say what it always says, and these."""
    with warnings.catch_warnings():
        for message in (*SAID, *messages):
            warnings.filterwarnings("ignore", message=message)
        yield


def made(
    package: Any,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    base: nn.Module | None = None,
    kind: str = "LoraConfig",
) -> Any:
    """A model of a package (``peft`` or `trimtab.peft`) with adapters by name, filled by `fill`, in eval mode."""
    model = tiny.llama(num_hidden_layers=2) if base is None else base
    first, *others = configs
    with quiet():
        wrapped = package.get_peft_model(
            model, getattr(package, kind)(**configs[first]), adapter_name=first
        )
        for name in others:
            wrapped.add_adapter(name, getattr(package, kind)(**configs[name]))
    for name in configs:
        fill(wrapped, name)
    return wrapped.eval()


@torch.no_grad()
def fill(model: nn.Module, name: str, size: float = 0.3) -> None:
    """Values away from the first ones, which depend on nothing but the names of the parameters."""
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        if name in parts and any(part.startswith(("lora_", "ia3_")) for part in parts):
            generator = torch.Generator().manual_seed(sum(map(ord, key)))
            value = torch.randn(parameter.shape, generator=generator) * size
            parameter.copy_(parameter + value if "magnitude" in key or "ia3" in key else value)


def both(configs: Mapping[str, Mapping[str, Any]], **options: Any) -> tuple[Any, Any]:
    """(PEFT's model, ours)."""
    base = options.pop("base", lambda: tiny.llama(num_hidden_layers=2))
    return made(peft, configs, base=base(), **options), made(face, configs, base=base(), **options)


@torch.no_grad()
def logits(model: nn.Module, who: str | Sequence[str] | None = None) -> Tensor:
    """Logits, with these adapters active."""
    if who is not None:
        model.set_adapter(who)  # type: ignore[operator]
    out: Tensor = model(input_ids=IDS).logits
    return out
