"""Which modules PEFT adapts where ``target_modules`` is not given: facts about models, by their type."""

from __future__ import annotations

from torch import nn

from trimtab.errors import TargetError

_LORA = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "bert": ("query", "value"),
    "t5": ("q", "v"),
}


def default_targets(peft_type: str, model: nn.Module) -> list[str]:
    """The default targets of a method in a model."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind not in _LORA:
        raise TargetError(
            f"there are no default target_modules for {kind or type(model).__name__!r}; name them, "
            "for example target_modules='all-linear'."
        )
    return list(_LORA[kind])
