"""LoReFT (Wu et al. 2024, arXiv 2404.03592): edit hidden states inside a low-rank subspace, at the prompt's ends.

    h' = h + Rᵀ( W h + b − R h ),   R Rᵀ = 1

R is the Gram-Schmidt basis of the rows of a trained matrix, found in each forward (by a Cholesky factor, in fp32
or wider), so its rows are orthonormal in any loop and any dtype. Around an optimiser's steps the matrix is then
replaced by that basis, so a file holds R itself, and loads bitwise. W = R, b = 0 is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from trimtab.adapt.contract import Init, Layer, Method, Params, Progress, Sites, Spec
from trimtab.adapt.intervention import Intervention, of_end
from trimtab.errors import UnsupportedError


def _orthogonal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Orthonormal rows."""
    return torch.nn.init.orthogonal_(torch.empty(shape), generator=generator)


@final
class LoReFT(Intervention):
    """``LoReFT(rank=8, first=7, last=7)``: at the output of every block ("f7+l7" in the paper)."""

    kind: ClassVar[str] = "loreft"
    basis_init: ClassVar[tuple[Init]] = (_orthogonal,)
    basis_cast: ClassVar[bool] = False

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if self.rank > layer.out_features > 0:
            raise UnsupportedError(
                f"loreft: no {self.rank} directions are orthonormal in a width of {layer.out_features}; lower the rank."
            )
        return super().tensors(layer, role)

    def subspace(self, basis: Tensor, dtype: torch.dtype) -> Tensor:
        return orthonormal(basis.to(torch.promote_types(basis.dtype, dtype))).to(dtype)

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        for end in self.ends:
            for p in sites.values():
                p[f"{end}.basis"].copy_(orthonormal(p[f"{end}.basis"]))

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        """Exact: in an orthonormal basis Q of all their rows, W = Q (1 + M) and b = Q c for the sum M h + c."""
        self.same_positions(parts)
        result: dict[str, Tensor] = {}
        for end in self.ends:
            each = [of_end(p, end) for _, p in parts]
            bases = [orthonormal(p["basis"]) for p in each]
            whole = torch.linalg.qr(torch.cat(bases).mT)[0].mT
            source, shift = whole, torch.zeros_like(whole[:, 0])
            for basis, p in zip(bases, each, strict=True):
                turned = whole @ basis.mT
                source = source + turned @ (p["source"] - basis)
                shift = shift + turned @ p["b"]
            result |= {f"{end}.basis": whole, f"{end}.source": source, f"{end}.b": shift}
        return self.replace(rank=result[f"{self.ends[0]}.b"].shape[0]), result


def orthonormal(rows: Tensor) -> Tensor:
    """The Gram-Schmidt basis of rows_RC."""
    factor = torch.linalg.cholesky_ex(rows @ rows.mT)[
        0
    ]  # no check, which would wait for the device
    return torch.linalg.solve_triangular(factor, rows, upper=False)
