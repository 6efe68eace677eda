"""Choosing places in a weight, for methods that change a few of its values.

Places are (2, K) int32, (row, column) of the weight as a matrix (out, all other axes), row by row: PEFT's grammar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.frozen import Layer


def chosen_places(
    layer: Layer,
    by: Literal["random", "magnitude", "fisher"],
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """``count`` places of a layer's weight: random ones, or those of its largest values or mean squared gradients."""
    if by == "random":
        return random_places(layer.matrix_shape(), count, generator)
    scores = layer.dense().abs() if by == "magnitude" else layer.observed["gradient"]
    return largest_places(scores.detach(), count)


def random_places(shape: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """``count`` places, all sets alike likely."""
    _check(shape, count)
    return _places(torch.randperm(math.prod(shape), generator=generator)[:count], shape[1])


def largest_places(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores; ``scores`` has the shape of the weight."""
    matrix = scores.flatten(1)
    _check((matrix.shape[0], matrix.shape[1]), count)
    return _places(matrix.flatten().topk(count).indices.cpu(), matrix.shape[1])


def shared_out(scores: Mapping[str, Sequence[Tensor]], budget: int) -> dict[str, int]:
    """How many of the ``budget`` largest scores of all lie in each weight, by path; at least one.

    Experts of one path get equal counts, because their tensors are stacked. Holds ``budget`` scores at a time
    beside those of one path.
    """
    kept, owners = torch.empty(0), torch.empty(0, dtype=torch.long)
    for number, each in enumerate(scores.values()):
        own = torch.cat([one.flatten().float().cpu() for one in each])
        own = own.topk(min(budget, own.numel())).values
        kept = torch.cat([kept, own])
        owners = torch.cat([owners, torch.full(own.shape, number)])
        best = kept.topk(min(budget, kept.numel())).indices
        kept, owners = kept[best], owners[best]
    counts = owners.bincount(minlength=len(scores)).tolist()
    return {
        path: max(1, count // len(each))
        for (path, each), count in zip(scores.items(), counts, strict=True)
    }


def _places(flat: Tensor, columns: int) -> Tensor:
    flat = flat.sort().values
    return torch.stack([flat // columns, flat % columns]).int()


def _check(shape: tuple[int, int], count: int) -> None:
    if count > math.prod(shape):
        raise ConfigError(
            f"{count} values were asked for in a weight of {shape[0]} × {shape[1]}; choose a smaller rank, share or "
            "count."
        )
