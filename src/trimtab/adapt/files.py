"""Adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's grammar, and ours.

    adapter_config.json        what PEFT, vLLM and SGLang read, for methods that they know
    adapter_model.safetensors  exactly the trained tensors, at PEFT's keys
    trimtab.json               schema, methods, sites, base fingerprint, provenance, checksums

Writing is atomic: everything goes to a temporary folder, is flushed to disk, and is renamed into place.
Reading checks keys both ways and unpickles nothing. A folder without ``trimtab.json`` is PEFT's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import Tensor

from trimtab.adapt.adapter import Adapter, Origin, SiteSpec, TensorName
from trimtab.adapt.contract import Place
from trimtab.adapt.disk import checksum, placing, read_json, read_tensors, replacing, write_json
from trimtab.adapt.fingerprint import Fingerprint
from trimtab.adapt.in_peft import TIED
from trimtab.adapt.lowbit import Packing, pack, unpack
from trimtab.adapt.multihead import named_by_peft, opened, peft_module
from trimtab.adapt.nested import experts_of, folded, unfolded
from trimtab.adapt.parse import method_from, methods
from trimtab.adapt.peft_config import CONFIG as CONFIG
from trimtab.adapt.peft_files import EMBEDDINGS, from_peft, peft_type
from trimtab.adapt.peft_files import WEIGHTS as WEIGHTS
from trimtab.adapt.slots import check_name
from trimtab.config import Config
from trimtab.errors import AttachError, ConfigError, FileFormatError
from trimtab.models.families import ROLES

SCHEMA: Literal[1] = 1
OURS = "trimtab.json"
TRAINING = frozenset({"total_step"})
"""Options of PEFT's that only training needs."""
OWN_TYPE = "TRIMTAB_"
"""What ``peft_type`` begins with where PEFT lacks the method: it then refuses the folder, as it should."""


class Entry(Config):
    """One tensor in the weights file: its site's path (empty for the whole adapter's), slot and checksum."""

    path: str
    slot: str
    sha256: str


class Description(Config):
    """What ``trimtab.json`` says.

    ``methods`` are the method, and the one that trains modules in full, if any are; ``sites`` are (path, role,
    number of the method), where the parts of a union count one by one. Checksums are of what reading gives.
    ``packing`` says what is stored in few bits; ``drawn`` holds checksums of tensors that are not in the file,
    because a seed gives them; ``in_peft`` whether PEFT has this in these places, ``plain_in_peft`` whether it has the
    form to share.
    """

    version: Literal[1] = Field(alias="schema")  # pydantic has a method of that name
    name: str
    methods: tuple[dict[str, Any], ...] = Field(min_length=1)
    sites: tuple[tuple[str, str, int], ...]
    base: Fingerprint | None
    base_name: str | None
    provenance: dict[str, Any]
    tensors: dict[str, Entry]
    packing: Packing | None = None
    in_peft: bool | None = None
    plain_in_peft: bool | None = None
    drawn: dict[str, str] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        check_name(value)
        return value


def save(
    adapter: Adapter,
    folder: Path,
    bits: int | None = None,
    *,
    beside: bool = False,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the adapter; an adapter that was in ``folder`` before is replaced whole or not at all.

    With ``beside``, what else lies in the folder stays. ``said`` are options of ``adapter_config.json`` that change
    nothing of the function, such as a revision.

    ``bits`` (8 or 4) rounds its matrices; how far off they are then is noted in the provenance.

    Raises:
        StorageError: the disk refused (full, read-only); what was there before is intact.
        ConfigError: a method is not registered under its kind, so no process could read it back.
    """
    adapter.check_whole("save")
    for method in (adapter.method, *adapter.methods):
        if methods.get(method.kind) is not type(method):
            raise ConfigError(
                f"method {method.kind!r} is registered as another class than {type(method).__name__}, so this "
                "adapter could not be read back; register it under a kind of its own."
            )
    tensors: dict[str, Tensor] = {}
    index: dict[str, Entry] = {}
    for name, tensor in adapter.named().items():
        key = disk_key(adapter, name)
        if tensor.is_meta:
            raise AttachError(
                f"adapter {adapter.name!r} lies on the meta device and has no values to save; give its model weights, "
                "and the adapter values, first."
            )
        if key in tensors:
            raise FileFormatError(
                f"two tensors of adapter {adapter.name!r} would share the key {key!r} on disk."
            )
        tensors[key] = tensor.detach().cpu().contiguous()
        index[key] = Entry(path=name.path, slot=name.slot, sha256=checksum(tensors[key]))
    provenance, packing = adapter.origin.provenance, None
    if bits is not None:
        fixed = {disk_key(adapter, name) for name in adapter.fixed}
        tensors, values, packing, error = pack(tensors, bits, fixed)
        index = {k: entry.replace(sha256=checksum(values[k])) for k, entry in index.items()}
        if error["max"] > 0 or "rounded" not in provenance:  # else it was rounded before
            provenance = {**provenance, "rounded": {"bits": bits, "error": error}}
    ours = Description(
        schema=SCHEMA,
        name=adapter.name,
        methods=tuple(
            method.to_dict()
            for method in (adapter.method, *adapter.methods[len(adapter.method.members) :])
        ),
        sites=tuple((site.path, site.role, site.method) for site in adapter.sites),
        base=adapter.base,
        base_name=adapter.origin.base_name,
        provenance=provenance,
        in_peft=adapter.origin.in_peft,
        plain_in_peft=adapter.origin.plain_in_peft,
        tensors=index,
        packing=packing,
        drawn=adapter.drawn,
    )
    if in_peft_form(adapter) and bits is None:
        tensors |= {key: tensors[own].clone() for key, own in _copied(adapter).items()}
    options = {**_peft_config(adapter, bits), **said}
    if (paths := experts_of(adapter)) and not options["peft_type"].startswith(OWN_TYPE):
        tensors, options["target_parameters"] = folded(tensors, adapter.method.peft_root, paths)
    with (placing if beside else replacing)(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, options)
        write_json(temporary / OURS, ours.model_dump(mode="json", by_alias=True))
    return folder


def load(folder: Path, *, name: str | None = None) -> Adapter:
    """Read an adapter folder.

    Raises:
        FileFormatError: a file is missing, torn or foreign, or its keys are not exactly those expected.
    """
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is not an adapter folder (no such directory).")
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            pickled = " Only safetensors are read; convert adapter_model.bin with PEFT first."
            extra = pickled if needed == WEIGHTS and (folder / "adapter_model.bin").exists() else ""
            raise FileFormatError(
                f"{folder} has no {needed}: not an adapter folder, or an incomplete one.{extra}"
            )
    tensors = read_tensors(folder / WEIGHTS)
    if (folder / OURS).is_file():
        config = read_json(folder / CONFIG)
        return _from_ours(folder, read_json(folder / OURS), config, tensors, name)
    return from_peft(folder, read_json(folder / CONFIG), tensors, name)


# -- keys ---------------------------------------------------------------------------------------------


def disk_key(adapter: Adapter, name: TensorName) -> str:
    """The key of a tensor in the weights file, in PEFT's grammar."""
    slot = name.slot
    if not name.path and adapter.method.peft_root == "base_model." and not in_peft_form(adapter):
        return f"base_model.{slot}"  # what PEFT means by `prompt_embeddings` is another table
    here = {site.method for site in adapter.sites if site.path == name.path}
    for number, method in enumerate(adapter.methods):
        if slot in method.disk and (not name.path or number in here):
            slot = method.disk[slot]
            slot = adapter.method.disk_beside.get(slot, slot)
            break
    if not name.path:
        return slot if slot != name.slot else f"base_model.{slot}"
    path = peft_module(name.path, opened(site.path for site in adapter.sites))
    return f"{adapter.method.peft_root}{path}.{slot}"


# -- reading ------------------------------------------------------------------------------------------


def _from_ours(
    folder: Path,
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    name: str | None,
) -> Adapter:
    schema = data.get("schema")
    if schema != SCHEMA:
        raise FileFormatError(
            f"{folder / OURS}: schema {schema!r}; this version of Trimtab reads schema {SCHEMA}."
        )
    try:
        ours = Description.parse(data, where=f"{folder / OURS}")
    except ConfigError as error:
        raise FileFormatError(str(error)) from None
    tensors = unpack(tensors, ours.packing, str(folder / WEIGHTS))
    if config.get("target_parameters"):
        tensors = unfolded(config, tensors, str(folder / WEIGHTS))
    sites = [SiteSpec(*site) for site in ours.sites]
    method = method_from(ours.methods[0])
    for site in sites:
        copied = f"{method.peft_root}{site.path}.weight"
        if site.role == TIED and copied not in ours.tensors:
            tensors.pop(copied, None)  # only PEFT wants it
    _same_keys(folder / WEIGHTS, set(ours.tensors), set(tensors))
    named = {}
    for key, entry in ours.tensors.items():
        if checksum(tensors[key]) != entry.sha256:
            raise FileFormatError(
                f"{folder / WEIGHTS}: tensor {key!r} does not match its checksum: the file is damaged, or "
                f"written by another program since (then remove {OURS}, which is not of this file)."
            )
        named[TensorName(entry.path, entry.slot)] = tensors[key]
    in_peft = not peft_type(folder, config).startswith(OWN_TYPE)
    origin = Origin(
        base_name=ours.base_name,
        task_type=config.get("task_type"),
        suffixes=tuple(config.get("target_modules") or ()),
        transposed=bool(config.get("fan_in_fan_out")),
        in_peft=in_peft if ours.in_peft is None else ours.in_peft,
        plain_in_peft=ours.plain_in_peft,
        provenance=ours.provenance,
    )
    adapter = Adapter(name or ours.name, method, sites, named, base=ours.base, origin=origin)
    if any(not 0 <= site.method < len(adapter.methods) for site in sites):
        raise FileFormatError(f"{folder / OURS}: a site is of a method that is not there.")
    adapter.drawn = dict(ours.drawn)
    _same_options(folder, adapter, config)
    return adapter


def _copied(adapter: Adapter) -> dict[str, str]:
    """Keys that PEFT wants at the other end of a tied embedding that is trained in full -> those of the embedding."""
    root, own, found = adapter.method.peft_root, "", {}
    full = [s for s in adapter.sites if s.method >= len(adapter.method.members)]
    for site in full:
        if site.role != TIED and site.path.rpartition(".")[2] in EMBEDDINGS:
            own = f"{root}{site.path}.weight"
    for site in full:
        if site.role == TIED and own:
            found[f"{root}{site.path}.weight"] = own
    return found


def _same_options(folder: Path, adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose two descriptions of the method differ: one of them was changed by hand."""
    said = json.loads(json.dumps(adapter.method.to_peft(_places(adapter))))
    for key, value in said.items():
        if key in config and config[key] != value and key not in TRAINING:
            raise FileFormatError(
                f"{folder / CONFIG} says {key}={config[key]!r}, and {OURS} says {value!r}. If the former was changed "
                f"on purpose, remove {OURS}: the folder is then read as PEFT reads it."
            )


def _same_keys(file: Path, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        parts = [f"{len(missing)} missing, e.g. {missing[0]!r}"] if missing else []
        parts += [f"{len(extra)} unexpected, e.g. {extra[0]!r}"] if extra else []
        raise FileFormatError(f"{file}: its tensors are not those of {OURS}: {'; '.join(parts)}.")


def _places(adapter: Adapter) -> list[Place]:
    """Where the parts of its method act, modules that are trained in full left out."""
    parts = range(adapter.method.peft_parts)
    return [place for number in parts for place in adapter.places(number)]


# -- writing ------------------------------------------------------------------------------------------


def in_peft_form(adapter: Adapter) -> bool:
    """Whether PEFT reads the adapter as it is written."""
    method = adapter.method
    nests = method.peft_nests or not experts_of(adapter)
    return adapter.origin.in_peft and method.peft_reads and nests


def _peft_config(adapter: Adapter, bits: int | None) -> dict[str, Any]:
    method = adapter.method
    places = _places(adapter)
    paths = named_by_peft(method.wrapped(places))
    experts, known = experts_of(adapter), in_peft_form(adapter)
    own = f"{OWN_TYPE}{method.kind.upper()}" + (f"_INT{bits}" if bits else "")
    base = {
        "peft_type": method.peft_kind if known and not bits else own,
        "task_type": adapter.origin.task_type,
        "base_model_name_or_path": adapter.origin.base_name,
        "inference_mode": True,
    }
    named = [path for path in paths if path not in experts]
    targets: dict[str, Any] = (
        {"target_modules": list(adapter.origin.suffixes or named) if named else []} if paths else {}
    )
    if adapter.origin.transposed:
        targets["fan_in_fan_out"] = True
    full: dict[str, Any] = {"modules_to_save": _trained(adapter)} if method.train else {}
    return {**base, **targets, **full, **method.to_peft(places), **_rows(adapter)}


def _trained(adapter: Adapter) -> list[str]:
    """The modules that are trained in full, by names that PEFT finds: it knows no roles."""
    names = [name for name in adapter.method.train if name not in ROLES]
    if len(names) < len(adapter.method.train):
        paths = [place.path for place in adapter.places(len(adapter.method.members))]
        others = [p for p in paths if not any(f".{n}." in f".{p}." for n in names)]
        tops = [path.partition(".")[0] for path in others]
        # the layers of one head are named together, as PEFT does
        names += [p if tops.count(top) == 1 else top for p, top in zip(others, tops, strict=True)]
    return list(dict.fromkeys(names))


def _rows(adapter: Adapter) -> dict[str, Any]:
    """The rows of embeddings that are trained beside a method of PEFT's."""
    parts = range(adapter.method.peft_parts, len(adapter.method.members))
    rows = {
        place.path: list(dict(adapter.methods[number])["ids"])
        for number in parts
        if adapter.methods[number].kind == "tokens"
        for place in adapter.places(number)
        if place.role != TIED
    }
    return {"trainable_token_indices": rows} if rows else {}
