"""EVA (Paischer et al. 2024, arXiv 2410.07170): A begins as the principal directions of the layer's own inputs.

    A = the leading r components of x over some batches,   B = 0

Ranks go where they explain most: of all components of all layers, the rank · layers with the largest shares of
their layer's variance are taken, at most ``rho`` · rank in one layer; alpha follows the rank, so that every layer
keeps its scale. ``rho=1`` leaves ranks as they are, as does a rank_pattern. Padding is not looked at, nor are
positions whose label is -100. Batches are read until the directions of every layer agree with those of the batch
before (a cosine of ``tau``), or to their end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.initial import Initialisation
from trimtab.adapt.observed import Inputs, Observation, Observed
from trimtab.errors import DataError


@final
class EVA(Initialisation):
    """``LoRA(init="eva")``, ``LoRA(init="eva(rho=1.0)")``."""

    rho: float = Field(default=2.0, ge=1)
    tau: float = Field(default=0.99, gt=0, le=1)

    def observes(self, rank: int) -> Observation | None:
        return Inputs(round(rank * self.rho), self.tau)

    def ranks(
        self, ranks: Mapping[str, int], observed: Mapping[str, Sequence[Observed]]
    ) -> Mapping[str, int]:
        if self.rho == 1:
            return ranks
        shares = {
            path: torch.stack(
                [_padded(o["shares"], round(rank * self.rho)) for o in observed[path]]
            )
            for path, rank in ranks.items()
        }
        owners = [path for path, share in shares.items() for _ in range(share.shape[1])]
        every = torch.cat([share.mean(0) for share in shares.values()])
        order = every.argsort(descending=True, stable=True)[: sum(ranks.values())].tolist()
        chosen = [owners[number] for number in order]
        return {path: chosen.count(path) for path in ranks}

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        found = observed["directions"]
        if found.shape[0] < rank:
            raise DataError(
                f"init eva found {found.shape[0]} directions in the {int(observed['count'])} inputs of a layer, and "
                f"its rank is {rank}; give more batches, or choose a smaller rank."
            )
        return found[:rank], torch.zeros(weight.shape[0], rank)


def _padded(shares: Tensor, size: int) -> Tensor:
    return torch.cat([shares[:size], shares.new_zeros(max(size - shares.shape[0], 0))])
