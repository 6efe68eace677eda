"""``nn.MultiheadAttention``, opened: its input projection as a linear layer, and the attention between the projections.

    q, k, v = rows 1..E, E+1..2E and 2E+1..3E of  W_in x + b_in,   each of its own x
    y       = W_out softmax(q kᵀ / √D + mask) v + b_out

torch computes all of it in one function that reads the weights and calls no layer; an edit needs layers to be called.

Shapes: B rows, T queries, S keys, E width, H heads, D = E / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UnsupportedError
from trimtab.frozen.linear import LinearMap

PARAMETER = "in_proj_weight"
OUTPUT = "out_proj"


def opens(module: nn.Module) -> bool:
    """Whether a module is such an attention, with one parameter for its three projections."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module._parameters.get(PARAMETER) is not None
    )


class InputProjection(LinearMap):
    """Queries, keys and values as one linear layer, (3E, E)."""

    module: nn.MultiheadAttention

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.in_features, self.out_features = module.embed_dim, 3 * module.embed_dim

    @classmethod
    def view(cls, module: nn.Module) -> InputProjection | None:
        """None: as a module, the attention is no layer; the path of its parameter is that of this one."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.dense().dtype

    @property
    def device(self) -> torch.device:
        return self.dense().device

    def dense(self) -> Tensor:
        weight = self.module.in_proj_weight
        if weight is None:
            raise AssertionError("`opens` has asked")
        return weight

    def bias(self) -> Tensor | None:
        return self.module.in_proj_bias

    def stored(self) -> dict[str, Tensor]:
        bias = self.bias()
        return {"weight": self.dense()} | ({} if bias is None else {"bias": bias})

    def call(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias())


@dataclass(frozen=True)
class Call:
    """What an attention was called with, by the names and defaults of its forward."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False

    def __post_init__(self) -> None:
        if self.is_causal and self.attn_mask is None:
            raise UnsupportedError(
                "nn.MultiheadAttention: is_causal is a hint about attn_mask, as in torch; pass that mask too."
            )


def attend(
    module: nn.MultiheadAttention, call: Call, q_BTE: Tensor, k_BSE: Tensor, v_BSE: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What enters the output projection (B, T, E), and the weights (B, H, T, S) if they are asked for.

    As torch does, a hint that the mask is causal is believed, where nothing else has to be hidden.
    """
    rows, heads = q_BTE.shape[0], module.num_heads
    more = 0
    if module.bias_k is not None and module.bias_v is not None:
        k_BSE = torch.cat([k_BSE, module.bias_k.to(k_BSE.dtype).expand(rows, 1, -1)], 1)
        v_BSE = torch.cat([v_BSE, module.bias_v.to(v_BSE.dtype).expand(rows, 1, -1)], 1)
        more += 1
    if module.add_zero_attn:
        k_BSE, v_BSE = (F.pad(t, (0, 0, 0, 1)) for t in (k_BSE, v_BSE))
        more += 1
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q_BTE, k_BSE, v_BSE))
    hinted = call.is_causal and not call.need_weights and call.key_padding_mask is None
    mask = None if hinted else _mask(call, rows, heads, q.dtype, more)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if call.need_weights:
        scores = q * math.sqrt(1.0 / q.shape[-1]) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hinted)
    return out.transpose(1, 2).flatten(2), weights


def _mask(call: Call, rows: int, heads: int, dtype: torch.dtype, more: int) -> Tensor | None:
    """What is added to the scores, broadcast over (B, H, T, S); nothing is hidden of ``more`` keys at the end."""
    found = []
    if call.attn_mask is not None:
        given = _added(call.attn_mask, dtype)
        found.append(given.unflatten(0, (rows, heads)) if given.dim() == 3 else given)
    if call.key_padding_mask is not None:
        found.append(_added(call.key_padding_mask, dtype).reshape(rows, 1, 1, -1))
    if not found:
        return None
    return F.pad(found[0] if len(found) == 1 else found[0] + found[1], (0, more))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans (true hides) as numbers to add."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
