"""State dicts of adapters and of the bare base, with PEFT's keys."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trimtab.adapt.adapter import Adapter


class LoadResult(NamedTuple):
    """What loading did not match; always empty here, because loading is strict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@torch.no_grad()
def replace_tensors(present: Adapter, new: Adapter) -> bool:
    """Write another adapter's values into the parameters of an attached one; whether they are alike enough."""
    mine, theirs = present.named(), new.named()
    if present.method != new.method or mine.keys() != theirs.keys():
        return False
    for name, tensor in mine.items():
        tensor.copy_(theirs[name])
    return True
