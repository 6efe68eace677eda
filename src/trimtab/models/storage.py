"""Which bases are loaded in few bits, and how: what `trimtab.models.load` asks before and after transformers loads.

transformers' own part (`trimtab.models.quantise`) is imported only where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from trimtab.errors import ConfigError, ModelError, UnknownNameError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Storage = Literal["nf4", "fp4", "int8", "fp8"]
STORAGES: tuple[str, ...] = get_args(Storage)


def quantising(
    where: str, options: dict[str, Any], storage: str | None, exempt: Sequence[str]
) -> dict[str, Any]:
    """Options for ``from_pretrained``: to round each weight as it is read, or to read what is stored in few bits.

    Raises:
        UnknownNameError: there is no such storage.
        ConfigError: the checkpoint is in few bits already.
    """
    if storage is not None and storage not in STORAGES:
        hint = suggest(storage, STORAGES) or f" Known: {', '.join(STORAGES)}."
        raise UnknownNameError(f"unknown storage {storage!r}.{hint}")
    if options:  # a GGUF file is unpacked by transformers first: see `settle`
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if storage is not None:
            raise ConfigError(
                f"{where!r} is stored in few bits already ({method}); leave out storage={storage!r}, or take its dense "
                "weights."
            )
        from trimtab.models.quantise import StorageConfig

        own = StorageConfig.of_checkpoint(stored if isinstance(stored, dict) else stored.to_dict())
        if own is None:
            return {}  # transformers reads it with the package that wrote it
        config.quantization_config = own.to_dict()
        return {"config": config}
    if storage is None:
        return {}
    from trimtab.models.quantise import StorageConfig

    return {"quantization_config": StorageConfig(storage, exempt)}


def settled(config: Any, storage: str | None, source: str) -> str | None:
    """How a model of this config will be stored, by what is asked for or by what its checkpoint says; what the config
    says of it is taken off.

    Raises:
        UnknownNameError: there is no such storage.
        ConfigError: the checkpoint is in few bits already.
        ModelError: it is in few bits of a kind that another package reads.
    """
    if storage is not None and storage not in STORAGES:
        hint = suggest(storage, STORAGES) or f" Known: {', '.join(STORAGES)}."
        raise UnknownNameError(f"unknown storage {storage!r}.{hint}")
    said = config.__dict__.pop("quantization_config", None)
    if said is None:
        return storage
    facts = said if isinstance(said, dict) else said.to_dict()
    if storage is not None:
        raise ConfigError(
            f"{source!r} is stored in few bits already ({facts.get('quant_method')}); leave out storage={storage!r}, "
            "or take its dense weights."
        )
    if facts.get("quant_method") != "bitsandbytes":
        raise ModelError(
            f"{source!r} is stored as {facts.get('quant_method')}, which another package reads; its memory cannot be "
            "planned without loading it."
        )
    return "int8" if facts.get("load_in_8bit") else str(facts.get("bnb_4bit_quant_type", "fp4"))


def settle(model: PreTrainedModel, storage: str | None, exempt: Sequence[str]) -> str | None:
    """How a loaded model is stored. Layers that came densely are rounded; transformers forgets that it had a hand in
    it, because it forbids things to models in few bits that ours can do.

    Raises:
        ModelError: what was stored in few bits could not be read.
        ConfigError: nothing could be stored so.
    """
    from trimtab.frozen.lowbit import LowBitLinear

    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None and storage is None:
        return None
    from trimtab.models.quantise import Quantiser, rounded

    if isinstance(quantiser, Quantiser):
        if quantiser.problems:
            raise quantiser.problems[0]
        quantiser.remove_quantization_config(model)
    kinds = [module.kind for module in model.modules() if isinstance(module, LowBitLinear)]
    if storage is not None:
        kinds = kinds or rounded(model, storage, exempt)
        if not kinds:
            raise ConfigError(
                f"storage={storage!r}: {type(model).__name__} has no linear layer that can be stored in few bits."
            )
    return max(set(kinds), key=kinds.count) if kinds else None
