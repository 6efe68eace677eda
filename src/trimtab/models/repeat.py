"""Models whose blocks are repeated: the same frozen weights several times in a row, each time with adapters of its own.

    repeat_blocks(model, [(0, 4), (2, 5)])        blocks 0 1 2 3 2 3 4

Each repetition is a module of its own that shares its weights with the block it repeats; the blocks themselves stay as
they are, and `restore_blocks` puts them back. Adapters are attached after it. (What PEFT calls layer_replication.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from trimtab.errors import AttachError, ConfigError, UnsupportedError
from trimtab.models.anatomy import Anatomy

Ranges = tuple[tuple[int, int], ...]
"""From each first block up to, but not including, the second."""
_PER_BLOCK = ("layer_types",)
"""Fields of a config that say something of each block."""


class RepeatedBlocks(nn.ModuleList):
    """The repetitions; they stand in the place of the blocks that they share their weights with. (A slice of them is
    made by torch, of the modules alone.)
    """

    ranges: Ranges = ()
    order: tuple[int, ...] = ()
    blocks: tuple[nn.ModuleList, ...] = ()
    """The blocks themselves, in a tuple, so that they are no children."""
    config_before: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, blocks: nn.ModuleList, ranges: Ranges, before: dict[str, Any]) -> RepeatedBlocks:
        order = tuple(number for start, stop in ranges for number in range(start, stop))
        new = cls([_sharing(blocks[number], place) for place, number in enumerate(order)])
        new.ranges, new.order, new.blocks, new.config_before = ranges, order, (blocks,), before
        return new.train(blocks.training)


def repeat_blocks(anatomy: Anatomy, ranges: Sequence[Sequence[int]]) -> None:
    """Repeat the blocks of a model, in place.

    Raises:
        ConfigError: ranges that name no blocks of this model.
        AttachError: it is repeated already.
        UnsupportedError: the model has no list of blocks, or several.
    """
    wanted: Ranges = tuple((int(start), int(stop)) for start, stop in ranges)
    if repeated(anatomy.modules.values()) is not None:
        raise AttachError("this model's blocks are repeated already; restore them first.")
    paths = {path.rpartition(".")[0] for path in anatomy.blocks}
    blocks = anatomy.modules.get(*paths) if len(paths) == 1 else None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != len(anatomy.blocks):
        raise UnsupportedError(
            f"{type(anatomy.root).__name__} has no one list of blocks, so none of them can be repeated."
        )
    for start, stop in wanted:
        if not 0 <= start < stop <= len(blocks):
            raise ConfigError(
                f"({start}, {stop}) are no blocks of this model: it has {len(blocks)}, and a range goes from the first "
                "up to, but not including, the last."
            )
    config = _config(anatomy.root)
    names = [n for n in _PER_BLOCK if isinstance(getattr(config, n, None), list)]
    before = {name: getattr(config, name) for name in names}
    if getattr(config, "num_hidden_layers", None) is not None:
        before["num_hidden_layers"] = config.num_hidden_layers
    new = RepeatedBlocks.of(blocks, wanted, before)
    for name in names:
        setattr(config, name, [before[name][number] for number in new.order])
    if "num_hidden_layers" in before:
        config.num_hidden_layers = len(new)
    _put(anatomy.root, blocks, new)


def repeated(modules: Iterable[nn.Module]) -> RepeatedBlocks | None:
    """The repetitions of the blocks of a model of these modules, if they are repeated."""
    return next((m for m in modules if isinstance(m, RepeatedBlocks)), None)


def restore_blocks(model: nn.Module) -> None:
    """The blocks as they were. Adapters of the repetitions must be gone."""
    if (found := repeated(model.modules())) is None:
        return
    config = _config(model)
    for name, value in found.config_before.items():
        setattr(config, name, value)
    _put(model, found, found.blocks[0].train(found.training))


def own_blocks(model: nn.Module) -> None:
    """Give each repetition weights of its own, so that it is a model like any other (merged, say)."""
    if (found := repeated(model.modules())) is None:
        return
    seen: set[int] = set()
    for block in found:
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in seen:
                    copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    module._parameters[name] = copied
                elif parameter is not None:
                    seen.add(id(parameter))
    _put(model, found, nn.ModuleList(list(found)).train(found.training))


def _sharing(module: nn.Module, place: int) -> nn.Module:
    """A module like this one with the same weights, which knows that it is at another place."""
    new = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # torch's own: parameters, buffers, hooks
            new.__dict__[name] = copy.copy(value)
    new._modules = {
        name: child if child is None else _sharing(child, place)
        for name, child in module._modules.items()
    }
    if "layer_idx" in new.__dict__:
        new.__dict__["layer_idx"] = place
    return new


def _config(model: nn.Module) -> Any:
    config = model.__dict__.get("config")
    get = getattr(config, "get_text_config", None)
    return config if get is None else get()


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
