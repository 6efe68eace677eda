"""Random draws around a matrix whose spread is learnt, and what holds their distributions near their priors.

    A' = A Σₙ πₙ + ε · Σₙ πₙ Zₙᵀ √V,   V = exp(2 σ) χ,   π = softmax(√S ζ + log α − mean log α),   α = exp(ρ)

Z_NIR and ζ_N are standard normal, χ_R chi-squared of R degrees of freedom, S the variance of a Dirichlet's logits. All
is PEFT's, number by number; the first term of `divergence` has Σ log Γ(α) with a plus, where the divergence of two
Dirichlet distributions has a minus.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-6
SLOTS = {
    f"lora_monteclora_sampler.{name}": short
    for name, short in (
        ("std_prior", "std"), ("expert_weights_prior", "rho"), ("gaussian_var_prior", "V"), ("expert_weights", "pi"),
    )
}  # fmt: skip
"""Slots of σ, ρ, and of the last V, as a matrix, and π."""


class Draws(NamedTuple):
    """Random numbers of one forward: Z_NIR, χ_R and ζ_N."""

    normal: Tensor
    chi: Tensor
    weights: Tensor


class Sample(NamedTuple):
    """What they make: A'_RI, V_R and π_N."""

    a: Tensor
    variance: Tensor
    weights: Tensor


def identity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The identity matrix."""
    return torch.eye(*shape)


def drawn(a_RI: Tensor, samples: int, generator: torch.Generator | None = None) -> Draws:
    """New numbers, by default from torch's own generator."""
    rank, features = a_RI.shape
    options: dict[str, Any] = {"dtype": a_RI.dtype, "device": a_RI.device, "generator": generator}
    chi = torch.randn(rank, rank, **options).float().square().sum(0)
    normal = torch.randn(samples, features, rank, **options)
    return Draws(normal, chi.to(a_RI.dtype), torch.randn(samples, **options))


def sampled(a_RI: Tensor, std_R: Tensor, rho_N: Tensor, draws: Draws, noise: float) -> Sample:
    """The matrix that draws make."""
    n = len(rho_N)
    variance = ((2 * std_R).exp() * draws.chi).clamp(min=1e-3)
    alpha = rho_N.exp().clamp(min=EPS)
    mode = alpha.log() - alpha.log().mean()
    spread = (1 / alpha * (1 - 2 / n) + (1 / alpha).sum() / n**2).clamp(min=EPS) + EPS
    weights = torch.softmax(spread.sqrt() * draws.weights + mode, -1)
    strayed = torch.einsum("n,nir->ri", weights, draws.normal) * variance.sqrt()[:, None]
    return Sample(a_RI * weights.sum() + noise * strayed, variance, weights)


def divergence(std_R: Tensor, rho_N: Tensor, variance_R: Tensor, prior: float) -> Tensor:
    """How far the distributions are from their priors."""
    rank, samples = len(std_R), len(rho_N)
    alpha = rho_N.exp()
    other = torch.full_like(alpha, prior)
    dirichlet = (
        torch.lgamma(alpha.sum())
        - torch.lgamma(other.sum())
        + (torch.lgamma(alpha) - torch.lgamma(other)).sum()
        + ((alpha - other) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
    )
    scale = (2 * std_R).exp()
    wishart = 0.5 * rank * (scale.sum() - scale.log().sum() - rank)
    variance = variance_R.clamp(min=EPS)
    return dirichlet + wishart + 0.5 * samples * (variance.sum() - variance.log().sum() - rank)
