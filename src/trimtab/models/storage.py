"""Which bases are loaded in few bits, and how: what `trimtab.models.load` asks before and after transformers loads.

transformers' own part (`trimtab.models.quantiser`) is imported only where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError, ModelError, UnknownNameError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.models.mixed import Mixed

STORAGES = ("nf4", "fp4", "int4", "int8", "int8-group", "fp8")
"""Formats that weights are rounded to."""
BLOCKS = "gguf"
"""The storage that leaves the weights of a GGUF file in their blocks."""
LOFTQ = "loftq"
"""The storage with options: ``loftq(rank=16)`` (`trimtab.frozen.loftq`)."""


@dataclass(frozen=True)
class Asked:
    """How a base is to be stored; see `trimtab.load`."""

    storage: str | None = None
    exempt: tuple[str, ...] = ()
    average_bits: float | None = None

    def check(self) -> None:
        """Raise for a storage that there is not, and for options that do not fit it."""
        own = [one.partition("=")[2] for one in self.exempt]
        if self.storage not in (None, BLOCKS):
            check_storage(self.storage, BLOCKS)
        for name in filter(None, own):
            check_storage(name)
        if self.storage == BLOCKS and any(own):
            raise ConfigError(
                "storage='gguf' leaves weights in the blocks of their file; exempt keeps some dense, and in no other "
                "format."
            )
        if self.storage is None and self.exempt:
            raise ConfigError("exempt leaves layers out of a storage; name the storage too.")
        if self.average_bits is not None:
            from trimtab.models.mixed import check_budget

            check_budget(self.storage, self.average_bits)


def check_storage(name: str, *others: str) -> None:
    """Raise `UnknownNameError` or `ConfigError` for what weights are not rounded to; ``others`` are known, too."""
    known = (*STORAGES, f"{LOFTQ}(rank=16)", *others)
    if name in (*STORAGES, *others) or _rounds_for_factors(name):
        return
    raise UnknownNameError(
        f"unknown storage {name!r}.{suggest(name, known) or ' Known: ' + ', '.join(known) + '.'}"
    )


def _rounds_for_factors(storage: str) -> bool:
    if not storage.startswith(LOFTQ):
        return False
    from trimtab.frozen.loftq import LoftQ

    return LoftQ.read(storage) is not None


def quantising(where: str, options: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """Options for ``from_pretrained``: to round each weight as it is read, or to read what is stored in few bits.

    Raises:
        ConfigError: the checkpoint is in few bits already, in another format than is asked for.
    """
    storage = asked.storage
    if options:
        return {}
    if storage == BLOCKS:
        raise ConfigError(
            f"storage='gguf' leaves the weights of a GGUF file in its blocks, and {where!r} is none; choose one of "
            f"{', '.join(STORAGES)}."
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if storage is not None and (asked.average_bits or storage != _format(stored)):
            raise ConfigError(
                f"{where!r} is stored in few bits already ({method}); leave out storage={storage!r}, or take its dense "
                "weights."
            )
        from trimtab.models.quantiser import StorageConfig

        own = StorageConfig.of_checkpoint(stored if isinstance(stored, dict) else stored.to_dict())
        if own is None and method == "compressed-tensors":
            raise ConfigError(
                f"{where!r} is stored by compressed-tensors in a form that Trimtab does not read (known: pack-, int- "
                "and float-quantized, of 2, 4 or 8 bits); decompress it first."
            )
        if own is None:
            return {}  # transformers reads it with the package that wrote it
        config.quantization_config = own.to_dict()
        return {"config": config}
    if storage is None:
        return {}
    from trimtab.models.quantiser import StorageConfig

    found = StorageConfig(storage, asked.exempt, average_bits=asked.average_bits)
    return {"quantization_config": found}


def settled(config: Any, asked: Asked, source: str) -> str | None:
    """How a model of this config will be stored, by what is asked for or by what its checkpoint says; what the config
    says of it is taken off.

    Raises:
        ConfigError: the checkpoint is in few bits already.
        ModelError: how many bits it takes is not known from the config.
    """
    storage = asked.storage
    if storage == BLOCKS:
        raise ModelError(
            f"the bits of {source!r} are those of each of its tensors, and cannot be planned without loading it; plan "
            "with storage=nf4 for an estimate."
        )
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
            f"{source!r} is stored as {facts.get('quant_method')}; how many bits that takes is not known from its "
            "config, so it cannot be planned without loading it."
        )
    return "int8" if facts.get("load_in_8bit") else str(facts.get("bnb_4bit_quant_type", "fp4"))


def from_gguf(
    where: str, file: str, auto: Any, asked: Asked, classes: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """A class of transformers, and options for its ``from_pretrained`` to read a GGUF file one tensor at a time, each
    rounded (or left in its blocks) at once; None where it must be unpacked as a whole first."""
    import torch
    from transformers import AutoConfig

    from trimtab.models.gguf_file import tensors
    from trimtab.models.quantise import targets
    from trimtab.models.quantiser import StorageConfig

    loose = {key: classes[key] for key in classes if key == "ignore_mismatched_sizes"}
    named = {key: classes[key] for key in classes if key not in loose}
    config = AutoConfig.from_pretrained(where, gguf_file=file, **named)
    with torch.device("meta"):
        model = auto.from_config(config)
    kept = targets(model, asked.exempt) if asked.storage == BLOCKS else ()
    found = tensors(Path(where) / file, model, blocks=kept)
    if found is None:
        return None
    options = {
        "config": config,
        "state_dict": found,
        "quantization_config": StorageConfig(
            str(asked.storage), asked.exempt, average_bits=asked.average_bits
        ),
        **loose,
    }
    return type(model), options


def can_ask(source: str, storage: str | None, exempt: tuple[str, ...]) -> bool:
    """Whether a base at a source can be loaded as another was stored (see `trimtab.adapt.fingerprint.Fingerprint`): its
    weights are dense where they lie, and the formats are some that weights are rounded to."""
    formats = {storage, *(one.partition("=")[2] for one in exempt if "=" in one)}
    if storage == BLOCKS:
        return Path(source).suffix == ".gguf" and formats == {BLOCKS}
    known = all(one in STORAGES or (one and _rounds_for_factors(one)) for one in formats)
    return known and not stored_already(source)


def stored_already(source: str) -> bool:
    """Whether the weights of a base are in few bits where they lie. What is wrong with a source, `load` says."""
    from transformers import PretrainedConfig

    if Path(source).suffix == ".gguf":
        return False
    try:
        facts, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return False
    return facts.get("quantization_config") is not None


def _format(stored: Any) -> str | None:
    """The format that a checkpoint's ``quantization_config`` names, where it is one of ours."""
    facts = stored if isinstance(stored, dict) else stored.to_dict()
    if facts.get("quant_method") == "trimtab":
        return facts.get("format")
    if facts.get("quant_method") == "bitsandbytes":
        return "int8" if facts.get("load_in_8bit") else facts.get("bnb_4bit_quant_type", "fp4")
    return None


def settle(model: PreTrainedModel, asked: Asked) -> tuple[str | None, Mixed | None]:
    """How a loaded model is stored, and what a budget chose. Layers that came densely are rounded; transformers forgets
    that it had a hand in it, because it forbids things to models in few bits that ours can do.

    Raises:
        ModelError: what was stored in few bits could not be read.
        ConfigError: nothing could be stored so.
    """
    from trimtab.frozen.lowbit import LowBit

    quantiser = getattr(model, "hf_quantizer", None)
    storage, mixed = asked.storage, None
    if quantiser is None and storage is None:
        return None, None
    if quantiser is not None and (named := foreign(quantiser)) is not None:
        return named, None
    from trimtab.models.quantise import rounded
    from trimtab.models.quantiser import Quantiser, forget

    if isinstance(quantiser, Quantiser):
        if quantiser.problems:
            raise quantiser.problems[0]
        quantiser.remove_quantization_config(model)
        forget(model)
        if asked.average_bits is not None and quantiser.rounding.mixer is not None:
            mixed = quantiser.rounding.mixer.done()
    kinds = [module.kind for module in model.modules() if isinstance(module, LowBit)]
    if storage is not None:
        if not kinds and storage != BLOCKS:
            mixed = rounded(model, storage, asked.exempt, asked.average_bits)
            kinds = [module.kind for module in model.modules() if isinstance(module, LowBit)]
        if not kinds and storage == BLOCKS:
            raise ConfigError(
                f"storage='gguf': no weight of this file lies in blocks that can stay as they are; choose one of "
                f"{', '.join(STORAGES)}, or none."
            )
        if not kinds:
            raise ConfigError(
                f"storage={storage!r}: {type(model).__name__} has no linear layer that can be stored in few bits."
            )
    return storage or (max(sorted(set(kinds)), key=kinds.count) if kinds else None), mixed


def foreign(quantiser: Any) -> str | None:
    """The name of a method of quantising whose own layers stay in the model; None where no layer of its kind does."""
    config = quantiser.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    return None if method in ("trimtab", BLOCKS) or getattr(config, "dequantize", False) else method
