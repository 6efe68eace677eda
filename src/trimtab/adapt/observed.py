"""What a method may ask of data before its adapter begins, and what it is told.

`trimtab.adapt.observe` runs the bare model over a few batches and finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trimtab.errors import DataError

Observed = Mapping[str, Tensor]
"""What was seen of one layer: ``directions_KI`` and ``shares_K``, or ``gradient`` in the weight's canonical
orientation; and ``count``, of the positions or of the batches that reached it. Or ``covariance_II``, or the
``original`` weight in canonical orientation."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The leading principal directions of a layer's inputs, and the share of their variance that each explains.

    ``alike`` is the cosine between two steps above which a direction no longer moves.
    """

    directions: int
    alike: float = 0.99


@dataclass(frozen=True, slots=True)
class Gradients:
    """The mean gradient of the loss in the weight, over batches; or over examples, the mean of its squares."""

    squared: bool = False


@dataclass(frozen=True, slots=True)
class Covariance:
    """The mean over batches of Xᵀ X, X being a layer's inputs in a batch over the largest of them."""


@dataclass(frozen=True, slots=True)
class Original:
    """The weight as it was before it was stored in few bits; nothing, where it is stored densely. It is no batch that
    shows it, but the checkpoint that the base was loaded from. ``storage`` is how it must be stored, if that matters.
    """

    storage: str = ""


Observation = Inputs | Gradients | Covariance | Original


def unseen(path: str, experts: int, expert: int) -> DataError:
    """The error for a layer, or one of its experts, that no batch reaches."""
    which = f"expert {expert} of {path}" if experts > 1 else path
    return DataError(
        f"no batch reaches {which}, so nothing is known of it; give more batches, or leave it out of the targets."
    )
