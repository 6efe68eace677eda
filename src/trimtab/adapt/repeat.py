"""Repeating the blocks of a model before adapters are attached to it; see `trimtab.models.repeat`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.adapt.bank import find_bank
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import AttachError
from trimtab.models import repeat


def repeat_blocks(model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
    """Let blocks of a model follow one another more than once, with the same frozen weights, in place.

    ``[(0, 4), (2, 5)]`` makes blocks 0 1 2 3 2 3 4; no weight is written or copied.

    Raises:
        AttachError: adapters are attached, or the model is repeated already.
        ConfigError: ranges that name no blocks of this model.
        UnsupportedError: the model has no list of blocks, or several.
    """
    _bare(model)
    repeat.repeat_blocks(anatomy_of(model), ranges)


def restore_blocks(model: nn.Module) -> None:
    """The blocks as they were before `repeat_blocks`.

    Raises:
        AttachError: adapters are attached.
    """
    _bare(model)
    repeat.restore_blocks(model)


def _bare(model: nn.Module) -> None:
    if find_bank(model) is not None:
        raise AttachError(
            "adapters are attached to this model's blocks, and would be moved with them; detach them first."
        )
