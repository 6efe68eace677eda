"""An adapter's tensors out of a state dict of its model, as it is gathered from shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.slots import memory_name
from trimtab.adapt.tree import canonical
from trimtab.errors import FileFormatError, StorageError, suggest
from trimtab.peft.names import own_names, unwrapped

ROOTS = ("base_model.model.", "base_model.")
"""What stands before a module's path in a model with a tuner, or with a prompt alone, around it."""


def gathered(
    adapter: Adapter, root: nn.Module, state: Mapping[str, Tensor]
) -> dict[TensorName, Tensor]:
    """An adapter's tensors in a state dict of its model ``root``, or of what stands around that."""
    by_key: dict[str, Tensor] = {}
    own = {unwrapped(there): unwrapped(key) for there, key in own_names(root).items()}
    for key, value in state.items():
        key = unwrapped(key)
        for begin in (*ROOTS, ""):  # a prompt has no tuner around the model
            if key.startswith(begin):
                inner = key[len(begin) :]
                by_key.setdefault(canonical(own.get(inner, inner)), value)
    places = {id(module): path for path, module in root.named_modules()}
    found = {}
    for name, tensor in adapter.named().items():
        path = places.get(id(adapter.held[name]), "")  # a prompt lies beside the model
        slot = memory_name(name.slot, adapter.name)
        key = canonical(unwrapped(f"{path}.{slot}" if path else slot))
        if key not in by_key:
            hint = suggest(key, by_key)
            raise FileFormatError(
                f"state_dict has no {key!r}, which adapter {adapter.name!r} needs.{hint}"
            )
        if by_key[key].numel() == 0 or by_key[key].shape != tensor.shape != (0,):
            raise FileFormatError(
                f"state_dict: {key!r} has shape {tuple(by_key[key].shape)}; it is a shard, or of another model. "
                "Gather the state dict first."
            )
        found[name] = whole(by_key[key], key)
    return found


def whole(tensor: Tensor, name: str) -> Tensor:
    """A tensor that can be written: one that is being gathered is waited for, one that is sharded is refused.

    Gathering shards here would wait for ever for the ranks that do not save.
    """
    plain = tensor.detach()
    if type(plain) is Tensor and plain.nbytes != plain.untyped_storage().nbytes():
        return plain.clone()  # a piece of a buffer that FSDP frees, which nobody may look into then
    if type(plain) is not Tensor and torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        plain = plain.clone()
        if isinstance(plain, DTensor):
            raise StorageError(
                f"{name} is sharded. Gather the model's state on all ranks, such as with accelerator.get_state_dict("
                "model), and pass it: save_pretrained(folder, state_dict=state, is_main_process=...)."
            )
    return plain
