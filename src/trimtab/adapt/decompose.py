"""Leading singular vectors of a large matrix, with random numbers of one's own.

A matrix A_MN is multiplied with q random vectors, and with itself ``niter`` times (Halko et al. 2009, algorithm
4.4); what comes out spans its leading directions, and the rest is a small exact decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading(
    matrix: Tensor, q: int, niter: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """About the ``q`` largest of U_Mq, S_q, Vᵀ_qN; exact where q is all there are. ``generator`` is on CPU."""
    rows, columns = matrix.shape
    if q >= min(rows, columns):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    if rows < columns:
        u, s, v = leading(matrix.T, q, niter, generator)
        return v.T, s, u.T
    random = torch.randn(columns, q, generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ random)
    for _ in range(niter):
        other, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, v
