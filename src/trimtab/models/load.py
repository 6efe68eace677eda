"""Load a frozen base: a Hugging Face folder, a hub id, or a GGUF file.

The dtype is bfloat16 where the machine multiplies it natively (CUDA that says so; x86 with AVX512-BF16
or AMX) and float32 elsewhere, where bfloat16 would be emulated and slower. Only safetensors and GGUF
are read, never a pickle. Weights that lack a tensor are an error: transformers would fill it with noise.

With ``storage`` the linear layers are kept in few bits (`trimtab.models.quantiser`): each weight is rounded as it is
read, so that the dense model is never in memory. Checkpoints of bitsandbytes, GPTQ, AWQ, compressed-tensors and
block-wise fp8 are read as they are, without these packages; others (torchao) by theirs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import ConfigError, ModelError, TrimtabError, UnknownNameError, suggest
from trimtab.models.mixed import Mixed
from trimtab.models.storage import Asked, from_gguf, quantising, settle, settled

Task = Literal[
    "causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification", "token-classification"
]
AUTO: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
NEW_HEADS = ("sequence-classification", "token-classification")


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model in eval mode, its tokenizer, the path or id that it was loaded from, how most of its linear layers
    are stored (None: densely), and what a budget of bits chose to keep in more of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    storage: str | None = None
    mixed: Mixed | None = None


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    task: Task = "causal-lm",
    labels: Sequence[str] | None = None,
    storage: str | None = None,
    exempt: Sequence[str] = (),
    average_bits: float | None = None,
) -> Base:
    """Load a base.

    Args:
        source: a folder, a hub id (``org/name``), or a ``.gguf`` file, which is unpacked to ``dtype``.
        dtype: of the weights; None follows the rule of this module.
        device: None is the first CUDA device, else the CPU.
        task: which head; a classification head that the weights lack starts at random, the same each time.
        labels: names of the classes of a classification head, in order; None is what the config says.
        storage: keep linear layers (and experts) in ``nf4`` (QLoRA's), ``fp4``, ``int4`` (with a scale and an offset
            for each 64 columns), ``int8``, ``int8-group`` or ``fp8``, or those of a GGUF file in its own blocks
            (``gguf``); or rounded for the factors of a LoRA with ``init="loftq"`` (``loftq(rank=16, iters=5)``). The
            head, embeddings and routers stay in ``dtype``, in which everything is computed.
        exempt: further modules that stay so: names, ends of names, or globs; with ``=int8`` behind, in that format.
        average_bits: a budget of bits a weight, scales included, for a base in four bits: as many layers as it allows,
            those of the largest quantisation error, are kept in int8 (``.mixed`` of the result says which).

    Raises:
        ModelError: no such model, no weights, torn weights, no tokenizer; says what to do.
        UnknownNameError: a task or dtype that does not exist.
    """
    asked = Asked(storage, tuple(exempt), average_bits)
    place, kind = _checked(task, labels, asked, device, dtype)
    where, options = _located(Path(source), str(source))
    with _explained(str(source)):
        auto = getattr(transformers, AUTO[task])
        with _quiet():
            found = quantising(where, options, asked)
            classes, file = _classes(labels), options.get("gguf_file")
            lazily = from_gguf(where, file, auto, asked, classes) if file and storage else None
            maker, found = lazily or (auto, _weights(options) | found | classes)
            model, facts = maker.from_pretrained(
                where if lazily is None else None, dtype=kind, output_loading_info=True, **found
            )
            model.name_or_path = where
        _check_whole(facts, str(source), str(model.base_model_prefix), new_head=task in NEW_HEADS)
        tokenizer = _tokenizer(where, options, str(source))
    if task in NEW_HEADS:
        _new_head(model, facts["missing_keys"])
        _pool_by(model, tokenizer)
    stored, mixed = settle(model, asked)
    model.requires_grad_(False)
    return Base(model.to(place).eval(), tokenizer, str(source), stored, mixed)


def load_hollow(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    task: Task = "causal-lm",
    labels: Sequence[str] | None = None,
    storage: str | None = None,
    exempt: Sequence[str] = (),
    average_bits: float | None = None,
) -> Base:
    """The base that `load` gives, without values: every tensor has its shape and dtype and lies on the meta device.

    Only the config and the tokenizer are read, and no weights need be there. The arguments are those of `load`;
    ``device`` is where the base would lie.

    Raises:
        ModelError: there is no config, transformers has no such model, or its weights are in few bits that cannot be
            planned.
    """
    asked = Asked(storage, tuple(exempt), average_bits)
    _, kind = _checked(task, labels, asked, device, dtype)
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{str(source)!r} has no config.json, so it is not a model folder.")
    where, options = (str(path), {}) if path.is_dir() else _located(path, str(source))
    with _explained(str(source)):
        config = transformers.AutoConfig.from_pretrained(where, **options, **_classes(labels))
        stored = settled(config, asked, str(source))
        with torch.device("meta"), _quiet():
            model = getattr(transformers, AUTO[task]).from_config(config, dtype=kind)
        tokenizer = _tokenizer(where, options, str(source))
    if task in NEW_HEADS:
        _pool_by(model, tokenizer)
    mixed = None
    if stored is not None:
        from trimtab.models.quantise import rounded

        mixed = rounded(model, stored, exempt, average_bits)
    model.requires_grad_(False)
    return Base(model.eval(), tokenizer, str(source), stored, mixed)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone, from what `load` takes; no weights are needed. Raises `ModelError`."""
    path = Path(source)
    with _explained(str(source)):
        if path.is_dir():
            return _tokenizer(str(path), {}, str(source))
        where, options = _located(path, str(source))
        return _tokenizer(where, options, str(source))


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else torch.float32


def stored_dtype(source: str | Path) -> str | None:
    """The dtype that a folder's ``config.json`` names, or None where it does not say."""
    file = Path(source) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None  # `load` says what is wrong with it
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) else None


def named_dtype(value: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """A dtype by its name; None is that of the machine's computation.

    Raises:
        UnknownNameError: there is no such name.
        ConfigError: no model computes in that dtype.
    """
    if value is None:
        return default_dtype(device)
    if isinstance(value, torch.dtype):
        if not value.is_floating_point or value.itemsize < 2:
            raise ConfigError(
                f"dtype={value}: a base computes in bfloat16, float16, float32 or float64; weights are kept in fewer "
                "bits by storage."
            )
        return value
    names = {
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    names |= {
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "fp16": torch.float16,
        "fp64": torch.float64,
    }
    if value not in names:
        raise UnknownNameError(
            f"unknown dtype {value!r}.{suggest(value, names) or ' Known: ' + ', '.join(names)}"
        )
    return names[value]


def _checked(
    task: str,
    labels: Sequence[str] | None,
    asked: Asked,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
) -> tuple[torch.device, torch.dtype]:
    """Where a base is to lie and what it computes in; an error for what cannot be asked of any base."""
    if task not in AUTO:
        raise UnknownNameError(
            f"unknown task {task!r}.{suggest(task, AUTO) or ' Known: ' + ', '.join(AUTO)}"
        )
    if labels is not None and task not in NEW_HEADS:
        raise ConfigError(f"labels are for a classification head; task {task!r} has none.")
    asked.check()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return place, named_dtype(dtype, place)


# -- where it lies --------------------------------------------------------------------------------


def _located(path: Path, source: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to be given: a folder or id, and the GGUF file in it."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {source!r}.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{source!r} is not a GGUF file (it does not begin with 'GGUF').")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        _check_folder(path)
        return str(path), {}
    if (
        path.exists()
        or path.is_absolute()
        or source.startswith((".", "~"))
        or source.count("/") > 1
    ):
        raise ModelError(f"{source!r} is not a model folder, a .gguf file or a hub id (org/name).")
    return source, {}


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        adapter = (
            " It is an adapter: load its base, then attach it."
            if (path / "adapter_config.json").exists()
            else ""
        )
        raise ModelError(f"{str(path)!r} has no config.json, so it is not a model folder.{adapter}")
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("pytorch_model*.bin"))
        advice = (
            "convert pytorch_model.bin to safetensors" if pickled else "download the model again"
        )
        raise ModelError(f"{str(path)!r} has no weights (no *.safetensors file); {advice}.")


def _weights(options: dict[str, Any]) -> dict[str, Any]:
    """Options for reading weights: GGUF blocks are unpacked; nothing is unpickled."""
    if not options:
        return {"use_safetensors": True}
    config = getattr(transformers, "GgufConfig", None)  # older releases always unpack
    return {
        **options,
        **({} if config is None else {"quantization_config": config(dequantize=True)}),
    }


def _classes(labels: Sequence[str] | None) -> dict[str, Any]:
    """Options for the classes of a head."""
    if labels is None:
        return {}
    named = dict(enumerate(labels))
    return {
        "id2label": named,
        "label2id": {name: number for number, name in named.items()},
        "ignore_mismatched_sizes": True,  # `_check_whole` says better what is wrong
    }


@torch.no_grad()
def _new_head(model: PreTrainedModel, missing: Sequence[str]) -> None:
    """Draw the matrices of a new head anew: a function of their names' order and shapes alone, so that a base is
    the same base each time it is loaded, in any dtype."""
    std = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
    generator = torch.Generator().manual_seed(0)
    for name in sorted(missing):
        parameter = model.get_parameter(name)
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _pool_by(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a decoder's head which token is padding: it pools by the last that is not."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


# -- what came of it -------------------------------------------------------------------------------


def _check_whole(facts: Any, source: str, prefix: str, *, new_head: bool) -> None:
    missing = sorted(key for key in facts["missing_keys"])
    if new_head:
        missing = [key for key in missing if key.startswith(f"{prefix}.")]
    if missing:
        raise ModelError(
            f"the weights of {source!r} lack {len(missing)} tensors of the model, e.g. {missing[0]!r}; "
            "they are incomplete or belong to another architecture. Download the model again."
        )
    wrong = sorted(str(key[0]) for key in facts["mismatched_keys"])
    if wrong:
        advice = (
            " It has a classification head of its own: leave the labels out to keep it, or load a base without one."
            if new_head
            else ""
        )
        raise ModelError(
            f"{source!r}: {len(wrong)} tensors have other shapes than asked for, e.g. {wrong[0]!r}.{advice}"
        )


def _tokenizer(where: str, options: dict[str, Any], source: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {source!r} has neither a padding nor an end token; set one."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """transformers' many exceptions as one `ModelError` that says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"the weights of {source!r} are torn or are not safetensors ({error}); download the model again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, TrimtabError):
            raise
        if not Path(source).exists() and isinstance(error, OSError):
            raise ModelError(
                f"{source!r} is neither a folder here nor a model that the hub gives us now. Check the "
                "name and the network, log in if it is gated, or give a local folder."
            ) from error
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{source!r} cannot be loaded: {text[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of missing keys: what matters of it becomes an error."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
