"""Reading options of PEFT's ``adapter_config.json``: what its selectors mean, and refusing what we lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import FileFormatError, UnsupportedError

CONFIG = "adapter_config.json"


def selectors(names: str | Sequence[str] | None) -> str | tuple[str, ...]:
    """PEFT's target modules as our selectors: names stay names, a text is a regular expression."""
    if isinstance(names, str):
        return names if names == "all-linear" else f"re:{names}"
    return tuple(sorted(names or ()))


_COMMON: dict[str, Any] = {
    "target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    "fan_in_fan_out": False, "init_weights": True,
}  # fmt: skip


def read_options(
    config: Mapping[str, Any],
    options: Mapping[str, tuple[str, Any]],
    lacks: Mapping[str, Any],
    kind: str,
) -> dict[str, Any]:
    """Our fields of a PEFT config: the selectors that its methods share, and these options.

    ``options`` maps PEFT's name to (our field, PEFT's default); ``lacks`` are options that we have not, with the
    defaults at which they do nothing.
    """
    read = {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "fan_in_fan_out",
        "init_weights",
        "bias",
    }
    refuse_unknown(config, _COMMON | dict(lacks), read | set(options), kind)
    layers = config.get("layers_to_transform")
    return {
        "targets": selectors(config.get("target_modules")),
        "exclude": selectors(config.get("exclude_modules")),
        "layers": (layers,) if isinstance(layers, int) else layers,
        **_biases(config),
        **{ours: _given(config, theirs, default) for theirs, (ours, default) in options.items()},
    }


def _biases(config: Mapping[str, Any]) -> dict[str, str]:
    """Our field of PEFT's ``bias``, where biases are trained; each method has a word for those of its targets."""
    value = str(config.get("bias") or "none")
    if value not in ("none", "all") and not value.endswith("_only"):
        raise FileFormatError(
            f"{CONFIG}: bias={value!r} is not none, all, or the name of the method with _only."
        )
    return {} if value == "none" else {"bias": "all" if value == "all" else "targets"}


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def refuse_unknown(
    config: Mapping[str, Any], defaults: Mapping[str, Any], read: set[str], kind: str
) -> None:
    """Raise for a PEFT option that is set away from its default and that nobody reads.

    The default ``...`` is for options whose value changes nothing here.
    """
    common = {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "modules_to_save", "runtime_config",
    }  # fmt: skip
    for key, value in config.items():
        if key in common | read:
            continue
        if key not in defaults:
            raise FileFormatError(
                f"{CONFIG}: unknown option {key!r} of {kind}; a newer PEFT wrote it."
            )
        if defaults[key] is not ... and value not in (defaults[key], None, [], {}, ""):
            raise UnsupportedError(
                f"{CONFIG}: option {key}={value!r} of {kind} changes the adapter; Trimtab lacks it."
            )
