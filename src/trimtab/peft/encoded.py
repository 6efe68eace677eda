"""Prompts that an encoder makes (P-tuning, a prefix behind an MLP): what is shared is the prompt, as in PEFT.

Their encoder is for training alone. It lies beside the prompt in a file of our own, for training that goes on:
`ENCODER`, whose metadata name the method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.disk import placing
from trimtab.adapt.encoder import TABLE
from trimtab.adapt.export import exported
from trimtab.adapt.files import disk_key
from trimtab.adapt.parse import method_from
from trimtab.errors import FileFormatError

PROMPTS = "base_model."
"""What `Method.peft_root` is for prompts and prefixes, which PEFT keeps beside the model."""
PEFTS = "prompt_embeddings"
"""What PEFT's files call a prompt."""
ENCODER = "trimtab_encoder.safetensors"


def has_encoder(adapter: Adapter) -> bool:
    """Whether an adapter is a prompt with an encoder, of which PEFT reads the prompt alone."""
    method = adapter.method
    return method.peft_root == PROMPTS and adapter.origin.in_peft and not method.peft_reads


def shared_form(adapter: Adapter, values: Mapping[TensorName, Tensor]) -> Adapter:
    """The adapter, or its prompt without the encoder, with these values; attached to nothing."""
    free = Adapter(
        adapter.name,
        adapter.method,
        adapter.sites,
        values,
        base=adapter.base,
        origin=adapter.origin,
    )
    free.drawn = dict(adapter.drawn)
    return exported(free) if has_encoder(adapter) else free


def write_encoder(adapter: Adapter, folder: Path) -> None:
    """Write what the encoder is made of."""
    tensors = {
        name.slot: tensor.detach().cpu().contiguous()
        for name, tensor in adapter.named().items()
        if not name.path
    }
    method = json.dumps(adapter.method.to_dict(), sort_keys=True)
    with placing(folder) as temporary:
        save_file(tensors, temporary / ENCODER, metadata={"format": "pt", "method": method})


def with_encoder(folder: Path, shared: Adapter) -> Adapter:
    """The adapter of a folder as it was trained, where its encoder lies beside the prompt ``shared``; else that.

    Raises:
        FileFormatError: the encoder makes another prompt.
    """
    file = folder / ENCODER
    if not file.is_file():
        return shared
    with safe_open(file, framework="pt") as opened:
        method = method_from(json.loads(opened.metadata()["method"]))
        found = {TensorName("", slot): opened.get_tensor(slot) for slot in opened.keys()}  # noqa: SIM118
    found |= {name: tensor for name, tensor in shared.named().items() if name.path}
    adapter = Adapter(
        shared.name, method, shared.sites, found, base=shared.base, origin=shared.origin
    )
    made, wanted = exported(adapter).named(), shared.named()
    alike = made.keys() == wanted.keys() and all(
        made[name].shape == wanted[name].shape
        and torch.allclose(made[name].float(), wanted[name].float(), atol=1e-4)
        for name in made
    )
    if not alike:
        raise FileFormatError(
            f"{file} makes another prompt than the one in this folder; it is of another adapter. Remove it to go on "
            "from the prompt alone."
        )
    return adapter


def without_encoder(
    adapter: Adapter, given: Mapping[str, Tensor], bare: Callable[[str], str]
) -> Adapter | None:
    """The prompt that is given instead of what makes it; None where ``given``, by ``bare`` keys, is something else."""
    shared = shared_form(adapter, adapter.named())
    keys = {name: bare(disk_key(shared, name)) for name in shared.named()}
    if set(keys.values()) != given.keys():
        return None
    values = {name: given[key].detach().clone() for name, key in keys.items()}
    return Adapter(
        shared.name, shared.method, shared.sites, values, base=shared.base, origin=shared.origin
    )


def prefix_of_peft(adapter: Adapter, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's prefix of an encoder-decoder in our layout, where each layer of the decoder has values of its own.

    Raises:
        FileFormatError: the adapter reaches the encoder too.
    """
    method = adapter.method
    if PEFTS not in given or method.kind != "prefix" or adapter.origin.in_peft:
        return given
    paths = [site.path for site in adapter.sites if site.method == 0]
    if any("encoder" in path.split(".") for path in paths):
        raise FileFormatError(
            f"adapter {adapter.name!r} reaches the encoder too, and PEFT's prefix is of the decoder alone; make it "
            "with PrefixTuningConfig."
        )
    config = {"num_transformer_submodules": 2, "num_layers": len(paths)}
    left = {key: value for key, value in given.items() if key != PEFTS}
    return {**left, TABLE: method.tensor_from_peft(config, TABLE, given[PEFTS])}
