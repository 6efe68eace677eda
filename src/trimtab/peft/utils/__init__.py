"""Names that PEFT's users import from ``peft.utils``, each imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    **dict.fromkeys(
        (
            "CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME", "cast_mixed_precision_params",
            "fsdp_auto_wrap_policy", "infer_device",
            "prepare_model_for_kbit_training", "shift_tokens_right",
        ),
        "trimtab.peft.utils.other",
    ),
    **dict.fromkeys(
        (
            "get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights",
            "set_base_model_state_dict", "set_peft_model_state_dict",
        ),
        "trimtab.peft.utils.save_and_load",
    ),
    **dict.fromkeys(("PeftType", "TaskType"), "trimtab.peft.types"),
    **dict.fromkeys(("NoMatchingPeftModuleError", "PeftError", "PeftWarning"), "trimtab.peft.errors"),
    "replace_lora_weights_loftq": "trimtab.peft.loftq",
}  # fmt: skip

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
