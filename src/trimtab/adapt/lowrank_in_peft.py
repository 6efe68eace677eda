"""LoRA's options as PEFT's config writes them, both ways; what `trimtab.adapt.lowrank` knows of PEFT.

An ``nn.MultiheadAttention`` is one place there, and its two projections are two here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.adapt.contract import Place, pattern_value
from trimtab.adapt.initial import again, initialisation
from trimtab.adapt.multihead import opened
from trimtab.adapt.peft_config import refuse_unknown, selectors
from trimtab.errors import UnsupportedError
from trimtab.frozen.multihead import OUTPUT, PARAMETER

if TYPE_CHECKING:
    from trimtab.adapt.lowrank import LowRank

PEFT_DEFAULTS: Mapping[str, Any] = {
    "r": 8, "target_modules": None, "exclude_modules": None, "lora_alpha": 8, "lora_dropout": 0.0,
    "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "init_lora_weights": True,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
    "megatron_config": None, "megatron_core": "megatron.core", "trainable_token_indices": None, "loftq_config": {},
    "eva_config": None, "corda_config": None, "lora_ga_config": None, "use_dora": False, "velora_config": None,
    "alora_invocation_tokens": None, "use_qalora": False, "qalora_group_size": ..., "monteclora_config": None,
    "layer_replication": None, "lora_bias": False, "target_parameters": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "ensure_weight_tying": False,
}  # fmt: skip
"""Options of PEFT's LoRA and their defaults: one that is set otherwise and that we lack is an error."""
VARIANTS = (
    "use_dora",
    "use_qalora",
    "kasa_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
)
"""Those of them that make it another method; each is a class here."""


def options_of(method: LowRank, places: Sequence[Place]) -> dict[str, Any]:
    """What PEFT's config says of a method."""
    start = initialisation(method.init)
    return {
        "r": method.rank,
        **({"lora_bias": True} if method.lora_bias else {}),
        "lora_alpha": int(method.alpha) if method.alpha.is_integer() else method.alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "bias": method.bias,
        "rank_pattern": _pattern(method.rank_pattern, places),
        "alpha_pattern": _pattern(method.alpha_pattern, places),
        **({} if start is None else start.to_peft()),
    }


def projections(paths: Iterable[str]) -> list[tuple[str, str]]:
    """The two projections of each ``nn.MultiheadAttention`` whose projections are among these paths."""
    found = sorted(opened(paths))
    return [(f"{path}.{PARAMETER}", f"{path}.{OUTPUT}") for path in found]


def _pattern(pattern: Mapping[str, Any], places: Sequence[Place]) -> dict[str, Any]:
    """A pattern in which an ``nn.MultiheadAttention`` stands for its projections."""
    pairs = projections(place.path for place in places)
    said = {one.removesuffix(f".{PARAMETER}"): pattern.get(one) for one, _ in pairs}
    left = {k: v for k, v in pattern.items() if all(k not in pair for pair in pairs)}
    more = {p: v for p, v in said.items() if v is not None and v != pattern_value(left, p, None)}
    return {**more, **left}


def fields_of(config: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Our fields of a PEFT LoRA config; ``own`` are options that the method reads itself.

    Raises:
        UnsupportedError: an option that we lack.
    """
    read = {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "layer_replication", "init_lora_weights", "lora_ga_config", "eva_config", "corda_config", "loftq_config",
        "lora_bias", *own,
    }  # fmt: skip
    refuse_unknown(config, PEFT_DEFAULTS, read, "LoRA")
    layers, init = config.get("layers_to_transform"), again(config)
    start = initialisation(init)
    if config.get("layer_replication") and start and (start.away or start.beside):
        raise UnsupportedError(
            f"init_lora_weights={init!r} with layer_replication: PEFT changed the one weight that repeated layers "
            "share once for each of them, so that none has the base that its factors were made for. Save it from "
            "PEFT in converted form (path_initial_model_for_weight_conversion)."
        )
    return {
        "targets": selectors(config.get("target_modules")),
        "exclude": selectors(config.get("exclude_modules")),
        "layers": (layers,) if isinstance(layers, int) else layers,
        "rank": config.get("r", 8),
        "alpha": float(config.get("lora_alpha", 8)),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora", False)),
        "bias": config.get("bias", "none"),
        "lora_bias": bool(config.get("lora_bias", False)),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "init": init,
    }  # fmt: skip
