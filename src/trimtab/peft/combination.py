"""How adapters are combined: what each kind does to the tensors of several adapters. See `trimtab.peft.weighted`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError, suggest

KINDS = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
Signs = Literal["total", "frequency"]


@dataclass(frozen=True)
class Combination:
    """How adapters are combined. Raises `ConfigError` for options that do not fit."""

    kind: str
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None
    density: float | None = None
    signs: Signs = "total"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = suggest(self.kind, KINDS) or f" Known: {', '.join(KINDS)}."
            raise ConfigError(f"there is no combination_type {self.kind!r}.{hint}")
        if self.signs not in ("total", "frequency"):
            raise ConfigError(
                f"majority_sign_method is 'total' or 'frequency', not {self.signs!r}."
            )
        if self.prunes and self.density is None:
            raise ConfigError(
                f"{self.kind} needs density, the share of entries that stay (0 to 1)."
            )
        if self.density is not None and not (self.prunes and 0 < self.density <= 1):
            what = "above 0 and at most 1" if self.prunes else f"nothing that {self.kind} has"
            raise ConfigError(f"density is {what}; it was {self.density!r}.")
        if not self.cuts and (self.rank is not None or self.clamp is not None):
            instead = f"{self.kind}_svd" if self.prunes else "svd"
            raise ConfigError(
                f"{self.kind} keeps all ranks; svd_rank and svd_clamp are for {instead}."
            )
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(f"svd_rank must be a whole number above 0, not {self.rank!r}.")
        if self.clamp is not None and not 0 < self.clamp <= 1:
            raise ConfigError(
                f"svd_clamp is a quantile, above 0 and at most 1, not {self.clamp!r}."
            )
        if self.driver is not None and not torch.cuda.is_available():
            raise ConfigError("svd_driver chooses a routine of CUDA; leave it out on a CPU.")

    @property
    def prunes(self) -> bool:
        return self.kind.removesuffix("_svd") not in ("svd", "linear", "cat")

    @property
    def votes(self) -> bool:
        return "ties" in self.kind

    @property
    def cuts(self) -> bool:
        """Whether the result is the nearest of some rank."""
        return self.kind.endswith("svd")

    @property
    def sums(self) -> bool:
        """Whether it is a weighted sum of the adapters as they are."""
        return not self.prunes or (self.density == 1 and not self.votes)

    def pruned(self, tensor: Tensor) -> Tensor:
        """What is left of one adapter's tensor."""
        if self.density is None or self.density == 1:
            return tensor
        if self.kind.startswith("dare"):
            kept = torch.bernoulli(torch.full_like(tensor, self.density))
            return tensor * kept / self.density
        largest = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        return tensor * torch.zeros_like(tensor).flatten().index_fill(0, largest, 1).view_as(tensor)

    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One tensor of several adapters' alike ones."""
        left = torch.stack([self.pruned(tensor) for tensor in tensors])
        weighted = left * left.new_tensor(weights).view(-1, *(1,) * (left.dim() - 1))
        if not self.votes:
            return weighted.sum(0)
        total = (left if self.signs == "total" else left.sign()).sum(0)
        agree = left.sign() == torch.where(total >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)
