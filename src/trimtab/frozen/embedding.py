"""Dense embeddings, as linear maps of one-hot vectors: canonical weight (width, vocabulary)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.frozen.layer import Layer, Push


class EmbeddingLayer(Layer):
    """``nn.Embedding``; a subclass that scales its output (Gemma, BART) says so in ``embed_scale``."""

    kind = "embedding"
    module: nn.Embedding

    def __init__(self, module: nn.Embedding) -> None:
        self.module = module
        self.in_features = module.num_embeddings
        self.out_features = module.embedding_dim
        self.scale = _scale(module)

    @classmethod
    def view(cls, module: nn.Module) -> EmbeddingLayer | None:
        if not isinstance(module, nn.Embedding):
            return None
        plain = type(module).forward is nn.Embedding.forward
        return cls(module) if plain or _scale(module) is not None else None

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    def dense(self) -> Tensor:
        return self.module.weight.T

    def orient(self, stored: Tensor) -> Tensor:
        return stored.T

    def bias(self) -> Tensor | None:
        return None

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.rescaled(self._look_up(x, weight))

    def call(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.rescaled(F.linear(self._look_up(x, a), b))

    def probe(self, push: Push) -> tuple[Tensor, Tensor | None]:
        rows_IO = push(self, torch.arange(self.in_features, device=self.device), None)
        scale = self.scale
        if scale is None:
            return rows_IO.T, None
        weight = rows_IO / (scale.to(rows_IO.dtype) if isinstance(scale, Tensor) else scale)
        return weight.T, None

    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if bias is not None:
            raise AssertionError("an embedding has no bias")
        new = type(self.module).__new__(type(self.module))
        nn.Module.__init__(new)
        new.__dict__.update(
            {k: v for k, v in self.module.__dict__.items() if not k.startswith("_")}
        )
        new._buffers.update(self.module._buffers)
        new.weight = nn.Parameter(weight.T.contiguous())
        return new

    def _look_up(self, x: Tensor, columns: Tensor) -> Tensor:
        """As the module looks its rows up: that of padding gets no gradient."""
        m = self.module
        return F.embedding(x, columns.T, m.padding_idx, scale_grad_by_freq=m.scale_grad_by_freq)

    def rescaled(self, y: Tensor) -> Tensor:
        scale = self.scale
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


def _scale(module: nn.Module) -> Tensor | float | None:
    """What a subclass multiplies its rows by: a buffer (Gemma) or a number (BART)."""
    buffer = module._buffers.get("embed_scale")
    if buffer is not None:
        return buffer
    number = module.__dict__.get("embed_scale")
    return float(number) if isinstance(number, int | float) else None
