"""Folders that PEFT wrote, read as a method, sites and tensors; what belongs to nothing in them is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter, Origin, SiteSpec, TensorName
from trimtab.adapt.contract import Method
from trimtab.adapt.disk import checksum
from trimtab.adapt.lowrank import LowRank
from trimtab.adapt.multihead import own_path, peft_attentions
from trimtab.adapt.nested import unfolded
from trimtab.adapt.parse import methods, of_peft_type
from trimtab.adapt.peft_config import CONFIG
from trimtab.adapt.tied import without_copied_rows, without_copies
from trimtab.errors import FileFormatError, suggest
from trimtab.frozen.multihead import OUTPUT

WEIGHTS = "adapter_model.safetensors"
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings"}
)
"""What models call their input embedding."""
TWICE = (0, 21, 2)
"""The last release of PEFT known to add the change of an ``nn.MultiheadAttention``'s ``out_proj`` twice."""
HEADS = frozenset({"lm_head", "embed_out", "output"})


def peft_type(folder: Path, config: Mapping[str, Any]) -> str:
    """Which method a config describes, in PEFT's word."""
    if not isinstance(kind := config.get("peft_type"), str):
        raise FileFormatError(f"{folder / CONFIG} does not say which 'peft_type' it describes.")
    return kind


def from_peft(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], name: str | None
) -> Adapter:
    """The adapter that a config and its tensors are.

    Raises:
        FileFormatError: a key belongs to nothing, or an option is not known.
        UnsupportedError: an option changes the adapter, and Trimtab lacks it.
    """
    kind = peft_type(folder, config)
    if next(of_peft_type(kind), None) is None:
        known = sorted({cls.peft_type for _, cls in methods.items() if cls.peft_type})
        hint = suggest(kind, known) or f" Known: {', '.join(known)}."
        raise FileFormatError(
            f"{folder / CONFIG}: peft_type {kind!r} is not a method that Trimtab reads.{hint}"
        )
    if config.get("target_parameters"):
        tensors = unfolded(config, tensors, str(folder / WEIGHTS))
        config = {**config, "target_parameters": None}
    if config.get("ensure_weight_tying"):
        tensors = without_copies(tensors, tuple(config.get("modules_to_save") or ()))
    if kind == "TRAINABLE_TOKENS":
        tensors = without_copied_rows(tensors, config.get("target_modules"))
    tokens = config.get("trainable_token_indices")
    if tokens:
        config = {**config, "trainable_token_indices": None}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    method = next(
        found for cls in of_peft_type(kind) if (found := cls.from_peft(config, shapes)) is not None
    )
    if isinstance(method, LowRank):
        attentions = peft_attentions(tensors, method.peft_root)
        method = _as_trained(folder, method.opening(attentions), attentions, config)
    if tokens:
        method = _with_tokens(folder, method, tokens, tensors)
    full = tuple(config.get("modules_to_save") or ())
    full = (*full, *_saved_embeddings(method, full, tensors))
    return _parsed(folder, method.replace(train=full) if full else method, tensors, name, config)


def _as_trained(
    folder: Path, method: LowRank, attentions: set[str], config: Mapping[str, Any]
) -> LowRank:
    """PEFT adds the change of an attention's output projection twice, in training too (up to `TWICE`)."""
    if not attentions:
        return method
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if version is None:
        warnings.warn(
            f"{folder / CONFIG} does not say which PEFT wrote it; those up to {'.'.join(map(str, TWICE))} add the "
            "change of an nn.MultiheadAttention's out_proj twice. Here it is added once.",
            stacklevel=2,
        )
    if version is None or tuple(map(int, version.groups())) > TWICE:
        return method
    paths = [f"{attention}.{OUTPUT}" for attention in sorted(attentions)]
    twice = {path: 2 * method.at(path).alpha for path in paths}
    others = {key: alpha for key, alpha in method.alpha_pattern.items() if key not in twice}
    return method.replace(alpha_pattern={**twice, **others})


def _with_tokens(
    folder: Path, method: Method, tokens: Any, tensors: Mapping[str, Tensor]
) -> Method:
    """The union of a method and the rows of embeddings that PEFT's file holds beside it."""
    ending = ".token_adapter.trainable_tokens_delta"
    found = [key.removeprefix(method.peft_root) for key in tensors if key.endswith(ending)]
    for path in [key.removesuffix(ending) for key in found]:
        named = tokens if isinstance(tokens, dict) else {path: tokens}
        ids = [of for name, of in named.items() if path == name or path.endswith(f".{name}")]
        if len(ids) != 1:
            raise FileFormatError(
                f"{folder / CONFIG}: trainable_token_indices does not tell the tokens of {path!r}."
            )
        rows = {"targets": (path,), "ids": tuple(ids[0]), "tie": True}
        method = method | methods.get("tokens").parse(rows)
    if not found:
        raise FileFormatError(
            f"{folder / WEIGHTS} has no rows for the trainable_token_indices of {CONFIG}."
        )
    return method


def _parsed(
    folder: Path,
    method: Method,
    tensors: dict[str, Tensor],
    name: str | None,
    config: Mapping[str, Any],
) -> Adapter:
    full = methods.get("full").parse({"targets": method.train}) if method.train else None
    named: dict[TensorName, Tensor] = {}
    slots_at: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    drawn: dict[str, str] = {}
    copies: dict[str, str] = {}
    attentions = peft_attentions(tensors, method.peft_root)
    for key, tensor in tensors.items():
        if path := _copied(key, tensors):
            copies |= {path: checksum(tensor.bfloat16())} if path != key else {}
            continue
        if (leaf := key.rpartition(".")[2]) in method.members[0].peft_drawn:
            found = checksum(tensor.float())
            if drawn.setdefault(leaf, found) != found:
                raise FileFormatError(f"{folder / WEIGHTS}: the copies of {leaf!r} differ.")
            continue
        path, slot, number = _place_key(folder, key, method, full)
        path = own_path(path, attentions)
        part = method.members[0]
        named[TensorName(path, slot)] = part.tensor_from_peft(config, slot, tensor)
        if path:
            slots_at.setdefault((path, number), {})[slot] = tuple(tensor.shape)
    parts = method.members
    sites = [
        SiteSpec(path, role, number)
        for (path, number), slots in sorted(slots_at.items(), key=lambda item: item[0][1])
        for role in (parts[number].roles_in_file(path, slots) if number < len(parts) else [""])
    ]
    own_name = name or (folder.name if folder.name.isidentifier() else "default")
    origin = Origin(
        base_name=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        transposed=bool(config.get("fan_in_fan_out")),
        rebuilt=method.rebuilt,
        repeats=tuple((a, b) for a, b in config.get("layer_replication") or ()),
        copies={path.removeprefix(method.peft_root): found for path, found in copies.items()},
    )
    adapter = Adapter(own_name, method, sites, named, origin=origin)
    adapter.drawn = drawn
    return adapter


def _saved_embeddings(
    method: Method, full: tuple[str, ...], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Embeddings and heads that PEFT saved whole, because the vocabulary was resized, or on request.

    They take the places of the base's, as modules do that are trained in full.
    """
    found = [
        key.removeprefix(method.peft_root).removesuffix(".weight")
        for key in tensors
        if key.startswith(method.peft_root) and key.endswith(".weight")
    ]
    named = {path: path.rpartition(".")[2] for path in found}
    paths = [path for path, leaf in named.items() if leaf in EMBEDDINGS | HEADS]
    if not any(named[path] in EMBEDDINGS for path in paths):
        return []  # a head alone is of something else
    return [path for path in paths if not any(f".{path}".endswith(f".{own}") for own in full)]


def _copied(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Whether a key is a copy that PEFT adds: of a frozen embedding to the factors beside it (whose path this is),
    and, where all biases are trained, of those of a module that is trained in full.
    """
    for kept in (".original_module.bias", ".modules_to_save.bias"):
        path, copied, _ = key.partition(kept)
        if copied and (own := tensors.get(f"{path}.bias")) is not None:
            return key if kept.startswith(".original") or torch.equal(own, tensors[key]) else ""
    path, copied, _ = key.partition(".base_layer.weight")
    beside = f"{path}.lora_embedding_A" in tensors or f"{path}.lora_A.weight" in tensors
    return path if copied and beside else ""


def _place_key(folder: Path, key: str, method: Method, full: Method | None) -> tuple[str, str, int]:
    """(path, slot, number of the method) of a key in a PEFT file."""
    by_disk = {
        method.disk_beside.get(disk, disk): (slot, number)
        for number, part in reversed(list(enumerate(method.members)))
        for slot, disk in part.disk.items()
    }
    if key in by_disk:
        return "", *by_disk[key]
    if key.startswith(method.peft_root):
        rest = key.removeprefix(method.peft_root)
        path, _, leaf = rest.rpartition(".")
        if full is not None and any(f".{module}." in f".{path}." for module in full.targets):
            for slot, disk in full.disk.items():
                if leaf == disk:
                    return path, slot, len(method.members)
        for disk in sorted(by_disk, key=len, reverse=True):
            if rest.endswith(f".{disk}"):
                path, (slot, number) = rest[: -len(disk) - 1], by_disk[disk]
                own = [n for n, m in enumerate(method.members) if m.targets == (path,)]
                return path, slot, own[0] if number and own else number
    raise FileFormatError(
        f"{folder / WEIGHTS}: key {key!r} belongs to no tensor of the method in {CONFIG}."
    )
