"""Causal attention within documents by torch's variable-length flash kernel: what CUDA has for `attention`.

Queries, keys and values of all rows are one run of tokens, and where its documents begin is told by numbers on the
device; so each document costs what it costs alone. The twin is `trimtab.kernels.attention.blocked_attention`.

Legend: B rows, H query heads, G key heads, T tokens, D head width, N documents and one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

CAUSAL = (-1, 0)
"""How far a token sees to the left (all of it) and to the right."""
OPTIONS = ("scale", "window_size", "enable_gqa")


def takes(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> bool:
    """Whether the kernel is there, and torch would let flash attention compute of these on this device."""
    return (
        q_BHTD.is_cuda
        and k_BGTD.shape == v_BGTD.shape
        and q_BHTD.shape[-1] % 8 == 0
        and _kernel() is not None
        and can_use_flash_attention(SDPAParams(q_BHTD, k_BGTD, v_BGTD, None, 0.0, True, True))
    )


def documents_attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float, starts_N: Tensor, longest: int
) -> Tensor:
    """(B, T, H, D): the output of attention; each token sees those of its document up to itself.

    ``starts_N`` (int32, on the device) says where documents of the flattened (B · T) tokens begin, and then where the
    last one ends; ``longest`` is the length of the longest.
    """
    kernel = _kernel()
    assert kernel is not None
    rows, heads, tokens, _ = q_BHTD.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHTD, k_BGTD, v_BGTD))
    found: Tensor = kernel(
        q, k, v, starts_N, starts_N, longest, longest, scale=scale, window_size=CAUSAL,
        enable_gqa=heads != k.shape[1],
    )  # fmt: skip
    return found.unflatten(0, (rows, tokens))


@cache
def _kernel() -> Callable[..., Any] | None:
    """torch's, where it takes a scale and fewer key heads than query heads (2.11 does not)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if all(option in known for option in OPTIONS) else None
