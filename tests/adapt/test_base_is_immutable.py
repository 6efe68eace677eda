"""The base is never written: not by training, not by merging, not by batch norms, in any storage."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer as a quantiser leaves it: codes of eight bits, a scale per row, and a forward."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("row_scale", scale)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.codes.to(x.dtype) * self.row_scale.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)
