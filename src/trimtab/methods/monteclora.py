"""MonteCLoRA (Seth et al. 2024, arXiv 2411.04358): in training A is the mean of random draws around itself.

    A' = A + ε · Σₙ πₙ Zₙ √V,   V = diag(exp(2 σ) χ),   π = softmax(log-normal around a Dirichlet's mode, exp(ρ))

Zₙ are standard normal, χ chi-squared of ``rank`` degrees of freedom. σ and ρ are learnt beside the factors, with a loss
that holds their distributions near their priors. In evaluation it is LoRA. The loss is PEFT's, number by number; its
first term has Σ log Γ(α) with a plus, where the divergence of two Dirichlet distributions has a minus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Spec, constant, uniform_from_zero
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.adapt.variant import Variant

SAMPLER = "lora_monteclora_sampler."
OWN = {
    "std_prior": "std",
    "expert_weights_prior": "rho",
    "gaussian_var_prior": "variance",
    "expert_weights": "weights",
}
"""What PEFT calls σ, ρ, and the last V and π."""
LOSS = "variational"
"""The name of its loss."""
EPS = 1e-6


class Draws(NamedTuple):
    """Random numbers of one forward: Z_NIR, χ_R and what the weights are drawn from, ζ_N."""

    normal: Tensor
    chi: Tensor
    weights: Tensor


class Sample(NamedTuple):
    """What they make: A', the diagonal of V and π."""

    a: Tensor
    variance: Tensor
    weights: Tensor


@final
class MonteCLoRA(Variant):
    """``MonteCLoRA(rank=16, samples=8)``; other fields as LoRA's."""

    kind: ClassVar[str] = "monteclora"
    variant: ClassVar[str] = "monteclora_config"
    linear_only: ClassVar[str] = "draws around matrices"
    disk: ClassVar[Mapping[str, str]] = {
        **LowRank.disk,
        **{f"{SAMPLER}{name}": f"{SAMPLER}{name}" for name in OWN},
    }
    short_names: ClassVar[Mapping[str, str]] = {
        **LowRank.short_names,
        **{f"{SAMPLER}{name}": short for name, short in OWN.items()},
    }

    samples: int = Field(default=8, ge=1)
    """N, draws in each forward."""
    entropy: bool = False
    """Keep π from gathering on one draw, by a loss of Σ π²."""
    dirichlet_prior: float = Field(default=0.1, gt=0)
    """Prior concentration of the Dirichlet distribution."""
    noise: float = 1e-4
    """ε, how far draws stray."""
    kl_weight: float = 1e-5
    """Weight of the divergences from the priors."""

    @property
    def fixed(self) -> frozenset[str]:
        return super().fixed | {f"{SAMPLER}gaussian_var_prior", f"{SAMPLER}expert_weights"}

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs, n, r = super().tensors(layer, role), self.samples, self.rank
        if role in BIASES:
            return specs
        names = {short: f"{SAMPLER}{name}" for name, short in OWN.items()}
        return {
            **specs,
            "std": Spec(names["std"], (r,), uniform_from_zero),
            "rho": Spec(names["rho"], (n,), uniform_from_zero),
            "variance": Spec(names["variance"], (r, r), _identity, cast=False),
            "weights": Spec(names["weights"], (n,), constant(1 / n), cast=False),
        }

    def change(self, p: Params, x: Tensor, at: At) -> Tensor:
        if not at.training:
            return super().change(p, x, at)
        sample = self.sample(p, self._draws(p["A"]))
        with torch.no_grad():
            p["variance"].copy_(sample.variance.diag())
            p["weights"].copy_(sample.weights)
        at.add_loss(LOSS, self.loss(p, sample) / at.count)
        return super().change({**p, "A": sample.a}, x, at)

    def _draws(self, a: Tensor) -> Draws:
        n, (r, features) = self.samples, a.shape
        options: dict[str, Any] = {"dtype": a.dtype, "device": a.device}
        chi = torch.randn(r, r, **options).float().square().sum(0)
        normal = torch.randn(n, features, r, **options)
        return Draws(normal, chi.to(a.dtype), torch.randn(n, **options))

    def sample(self, p: Params, draws: Draws) -> Sample:
        """A' and what it is made of, from the tensors of a site."""
        n = self.samples
        variance = ((2 * p["std"]).exp() * draws.chi).clamp(min=1e-3)
        alpha = p["rho"].exp().clamp(min=EPS)
        mode = alpha.log() - alpha.log().mean()
        spread = (1 / alpha * (1 - 2 / n) + (1 / alpha).sum() / n**2).clamp(min=EPS) + EPS
        weights = torch.softmax(spread.sqrt() * draws.weights + mode, -1)
        noise = (
            torch.einsum("n,nir->ri", weights, draws.normal)
            * (self.noise * variance.sqrt())[:, None]
        )
        return Sample(p["A"] * weights.sum() + noise, variance, weights)

    def loss(self, p: Params, sample: Sample) -> Tensor:
        """The loss of one site."""
        r = self.rank
        alpha = p["rho"].exp()
        prior = torch.full_like(alpha, self.dirichlet_prior)
        dirichlet = (
            torch.lgamma(alpha.sum())
            - torch.lgamma(prior.sum())
            + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
            + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
        )
        scale = (2 * p["std"]).exp()
        wishart = 0.5 * r * (scale.sum() - scale.log().sum() - r)
        variance = sample.variance.clamp(min=EPS)
        normal = 0.5 * self.samples * (variance.sum() - variance.log().sum() - r)
        entropy = sample.weights.square().sum() if self.entropy else 0.0
        return self.kl_weight * (dirichlet + wishart + normal) + entropy

    def variant_to_peft(self) -> dict[str, Any]:
        return {
            "monteclora_config": {theirs: dict(self)[ours] for theirs, ours in _OPTIONS.items()}
        }

    @classmethod
    def fields_of_variant(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return cls.read(config, _OPTIONS, unused=("buffer_size",))


_OPTIONS = {
    "num_samples": "samples",
    "use_entropy": "entropy",
    "dirichlet_prior": "dirichlet_prior",
    "sample_scaler": "noise",
    "kl_loss_weight": "kl_weight",
}
"""PEFT's option -> our field. Its buffer of draws is not needed."""


def _identity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The identity matrix."""
    return torch.eye(*shape)
