"""Edits of tied weights: an embedding and a head that share one weight are edited by the same tensors.

The tensors lie at the embedding. The other modules that have its weight are sites in the role `TIED`, without tensors
of their own: their edits read those of the embedding, and gradients from all of them meet there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.adapt.contract import Place
from trimtab.adapt.in_peft import TIED
from trimtab.errors import AttachError
from trimtab.models.anatomy import Anatomy

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter, SiteSpec


def group(anatomy: Anatomy, path: str) -> list[str]:
    """The modules that share the weight at a path with an embedding, that embedding first; empty if none does."""
    one = {path, *anatomy.tied(path)}.difference(anatomy.uncalled)
    if path not in one or len(one) == 1:
        return []
    paths = [p for p in anatomy.modules if p in one]
    homes = [p for p in paths if isinstance(anatomy.modules.get(p), nn.Embedding)]
    return [homes[0], *(p for p in paths if p != homes[0])] if homes else []


def with_tied(anatomy: Anatomy, places: Sequence[Place], *, more: bool = True) -> list[Place]:
    """These places; where one is of a tied weight, its embedding and all others that share it (``more``: also such as
    are not among the places)."""
    found: dict[str, Place] = {}
    asked = {place.path for place in places if not place.role}
    for place in places:
        tied = [] if place.role else group(anatomy, place.path)
        if not more:
            tied = [path for path in tied if path in asked]
        for path in tied or [place.path]:
            found.setdefault(f"{path} {place.role}", Place(path, place.role))
        for path in tied[1:]:
            found[f"{path} {place.role}"] = Place(path, TIED)
    return list(found.values())


def home_of(adapter: Adapter, site: SiteSpec, anatomy: Anatomy) -> int:
    """The number of the site whose tensors a tied one reads.

    Raises:
        AttachError: in this model, their weights are not tied.
    """
    tied = set(anatomy.tied(site.path))
    for number, other in enumerate(adapter.sites):
        if other.path in tied and other.method == site.method and other.role != TIED:
            return number
    raise AttachError(
        f"adapter {adapter.name!r} edits {site.path!r} as it edits the embedding that it is tied to, and in this model "
        "it is tied to none; tie the weights first (model.tie_weights())."
    )


def without_copies(tensors: Mapping[str, Tensor], full: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of PEFT's file without those that it wrote again at the other end of a tied weight.

    ``full`` are the names of modules that are trained in full.
    """
    kept = dict(tensors)
    whole = [p for p in _ends(tensors, ".weight") if any(f".{p}".endswith(f".{m}") for m in full)]
    for path in whole:
        for other in _ends(tensors, ".weight"):
            if other not in whole and _same(tensors[f"{other}.weight"], tensors[f"{path}.weight"]):
                kept.pop(f"{other}.weight", None)
    for key, b in tensors.items():
        path, found, _ = key.partition(".lora_embedding_B")
        if not found:
            continue
        a = tensors[f"{path}.lora_embedding_A"]
        for other in _ends(tensors, ".lora_A.weight"):
            pair = tensors[f"{other}.lora_A.weight"], tensors[f"{other}.lora_B.weight"]
            if _same(pair[0], b.T) and _same(pair[1], a.T):
                del kept[f"{other}.lora_A.weight"], kept[f"{other}.lora_B.weight"]
                kept.pop(f"{other}.base_layer.weight", None)
    return kept


def without_copied_rows(tensors: Mapping[str, Tensor], targets: Any) -> dict[str, Tensor]:
    """Rows of embeddings in PEFT's file, without those that it wrote again for a tied head, which is no target."""
    ending = ".trainable_tokens_delta"
    named = [targets] if isinstance(targets, str) else list(targets or ())
    paths = _ends(tensors, ending)
    own = [p for p in paths if any(re.fullmatch(rf"(.*\.)?({name})", p) for name in named)]
    copies = {
        f"{path}{ending}"
        for path in set(paths) - set(own)
        for other in own
        if _same(tensors[f"{path}{ending}"], tensors[f"{other}{ending}"])
    }
    return {key: tensor for key, tensor in tensors.items() if key not in copies}


def _ends(tensors: Iterable[str], ending: str) -> list[str]:
    return [key.removesuffix(ending) for key in tensors if key.endswith(ending)]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
