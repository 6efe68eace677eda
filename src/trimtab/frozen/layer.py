"""What a method may know of a frozen layer, whatever its kind and however its weight is stored.

A `Layer` is a read-only view of one module of the base. Its weight has one canonical orientation,
``(out, in, *kernel)``, so that a method is written once:

    Linear, Conv1D    y = x Wᵀ            x_..I, W_OI, y_..O
    Embedding         y = one_hot(x) Wᵀ   x_.. (ids), I = vocabulary, O = width
    ConvNd            y = conv(x, W)      x_BI.., W_OIK
    Norm              y = norm(x) · W     elementwise: I = O, W_O
    Expert            y = x Wᵀ            one expert's slice of a 3-D parameter

A storage backend (dense here; NF4, INT8 … later) is one file with subclasses that answer the same
questions; methods, sites and merging know only this class. ``view(module)`` finds the class through
the registry ``layers`` (entry-point group ``trimtab.frozen``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimtab.errors import TargetError, UnsupportedError
from trimtab.kernels.lowrank import Frozen
from trimtab.kernels.sparse import scattered
from trimtab.registry import Registry

PIECE = 1 << 20
"""Most values of a narrow weight that are widened at once."""
Push = Callable[["Layer", Tensor, Tensor | None], Tensor]
"""Runs an edit around a layer: ``push(layer, x, y)`` is the edited output; ``y`` None = call the layer."""


class Layer(ABC):
    """View of one frozen layer. Abstract; every concrete kind is final."""

    kind: ClassVar[str]
    transposed: ClassVar[bool] = False
    """Whether a linear layer stores its weight as (in, out), which PEFT calls ``fan_in_fan_out``."""
    other_in_peft: str = ""
    """Why PEFT has no such layer, or another function for it; empty if it has the same."""
    rounded: bool = False
    """Whether its weight is stored in few bits, so that it is no longer what the checkpoint held."""
    even: bool = True
    """Whether kernel, stride and padding, if there are any, are the same along every axis."""
    zero_padded: bool = True
    """Whether its input is padded with zeros, if with anything."""
    module: nn.Module
    root: nn.Module | None = None
    """The model that it lies in, which tells what it does not tell itself."""
    in_features: int
    out_features: int
    _squares: tuple[object, Tensor] | None = None
    """Row norms, squared, and the state of the weight that they are of."""
    observed: Mapping[str, Tensor] = MappingProxyType({})
    """What some batches of data showed of this layer, while its adapter begins (`trimtab.adapt.observe`)."""

    @classmethod
    @abstractmethod
    def view(cls, module: nn.Module) -> Layer | None:
        """The view of ``module``, or None when this class does not describe it."""

    @property
    def storage(self) -> str:
        """How its weight is stored in few bits, where that is known; else empty."""
        return ""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """dtype of the layer's computation."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight as a dense tensor in canonical orientation (a view where storage allows)."""

    @abstractmethod
    def bias(self) -> Tensor | None: ...

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own map with another canonical weight, and no bias."""

    @abstractmethod
    def call(self, x: Tensor) -> Tensor:
        """The frozen layer itself."""

    @abstractmethod
    def probe(self, push: Push) -> tuple[Tensor, Tensor | None]:
        """``(W', b')`` of an affine edit, found by pushing a basis of the inputs through it (fp32)."""

    def stored(self) -> dict[str, Tensor]:
        """The layer's own ``weight`` and ``bias`` as the module stores them."""
        own = self.module._parameters
        return {name: value for name in ("weight", "bias") if (value := own.get(name)) is not None}

    def holding(self) -> Iterable[Tensor]:
        """The tensors in which the weight is stored, in whatever form."""
        return self.stored().values()

    def orient(self, stored: Tensor) -> Tensor:
        """A weight as the module stores it -> canonical orientation."""
        return stored

    @abstractmethod
    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A new module of the same kind that holds ``weight`` and ``bias`` densely."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight in canonical orientation, (out, in, *kernel)."""
        return self.out_features, self.in_features

    # -- low-rank factors: ΔW = B A without building ΔW ------------------------------------------

    def product_of(self, x: Tensor) -> Frozen | None:
        """The linear map that calling the layer with x is, in the dtype that autocast says, where it is no more."""
        return None

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A_RI and B_OR."""
        return (rank, self.in_features), (self.out_features, rank)

    @abstractmethod
    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``apply(x, B A)`` at low-rank cost."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """ΔW = B A in canonical orientation."""
        return b @ a

    # -- sparse changes: ΔW given by places in the weight as a matrix (out, the rest) ----------------

    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight as a matrix: (out, all other axes)."""
        return self.shape[0], math.prod(self.shape[1:])

    def scattered(self, indices: Tensor, values: Tensor) -> Tensor:
        """ΔW in canonical orientation: ``values_K`` at the places ``indices_2K`` of the matrix."""
        return scattered(indices, values, self.matrix_shape()).reshape(self.shape)

    def sparse(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """``apply(x, ΔW)``; without the dense ΔW where the kind allows."""
        return self.apply(x, self.scattered(indices, values))

    # -- channels --------------------------------------------------------------------------------

    def over_in(self, v: Tensor) -> Tensor:
        """A vector over the input channels, shaped to broadcast over the input."""
        return v

    def over_out(self, v: Tensor) -> Tensor:
        """A vector over the output channels, shaped to broadcast over the output."""
        return v

    def rescaled(self, y: Tensor) -> Tensor:
        """What the layer itself does to a product with its weight (some embeddings scale theirs)."""
        return y

    # -- norms of the output channels, in fp32 or wider ---------------------------------------------

    def row_norms(self) -> Tensor:
        """‖W_o‖ of each output channel."""
        return self._kept_squares().sqrt()

    def edited_row_norms(self, a: Tensor, b: Tensor) -> Tensor:
        """‖(W + B A)_o‖ = √(‖W_o‖² + 2⟨W_o, (BA)_o⟩ + ‖(BA)_o‖²), without building B A or the sum."""
        a_GRI, b_GOR = self._grouped(a, b)
        gram_GRR = a_GRI @ a_GRI.mT
        squares = ((b_GOR @ gram_GRR) * b_GOR).sum(-1).flatten()
        total = self._kept_squares() + 2 * self.row_dots(a, b) + squares
        return total.clamp_min(0).sqrt()

    def row_squares(self) -> Tensor:
        """‖W_o‖² of each output channel; a backend that never holds W densely answers this and `row_dots`."""
        weight = self.dense().flatten(1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()

    def row_dots(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨W_o, (BA)_o⟩ of each output channel, as the sums of (W Aᵀ) ⊙ B."""
        a_GRI, b_GOR = self._grouped(a, b)
        w_GOI = self.dense().flatten(1).unflatten(0, (b_GOR.shape[0], -1))
        if w_GOI.dtype == a_GRI.dtype:
            projected = w_GOI @ a_GRI.mT
        else:  # a narrow weight is widened a few rows at a time
            some = max(1, PIECE // w_GOI[:, 0].numel())
            pieces = [rows.to(a_GRI.dtype) @ a_GRI.mT for rows in w_GOI.split(some, dim=1)]
            projected = torch.cat(pieces, dim=1)
        return (projected * b_GOR).sum(-1).flatten()

    def _kept_squares(self) -> Tensor:
        """‖W_o‖²: the weight is frozen, so it is computed once, and again only where another was put there."""
        if torch.compiler.is_compiling():
            return self.row_squares()
        now = (self.dtype, self.device, *stamp(self.holding()))
        if self._squares is None or self._squares[0] != now:
            self._squares = now, self.row_squares()
        return self._squares[1]

    def _grouped(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Factors as (G, R/G, I) and (G, O/G, R/G), one pair for each group of channels; mostly G is 1."""
        a, b = self.wide(a).flatten(1), self.wide(b).flatten(1)
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), self.dtype)
        groups = a.shape[0] // b.shape[1] if b.shape[1] else 1
        return a.to(dtype).unflatten(0, (groups, -1)), b.to(dtype).unflatten(0, (groups, -1))

    def wide(self, value: Tensor) -> Tensor:
        """A tensor as merging and norms compute with it: in fp32, or in fp64 where it is already."""
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """dtype in which an edit of this layer computes: that of a floating input, else the layer's."""
        return x.dtype if x.is_floating_point() else self.dtype


layers: Registry[type[Layer]] = Registry(
    "frozen layer",
    "trimtab.frozen",
    {
        "linear": "trimtab.frozen.linear:LinearLayer",
        "conv1d-hf": "trimtab.frozen.linear:Conv1DLayer",
        "embedding": "trimtab.frozen.embedding:EmbeddingLayer",
        "conv": "trimtab.frozen.conv:ConvLayer",
        "norm": "trimtab.frozen.norm:NormLayer",
        "lowbit": "trimtab.frozen.lowbit:LowBitLayer",
        "opaque": "trimtab.frozen.opaque:OpaqueLinear",
    },
)
"""All kinds. ``opaque`` (anything that says in_features and out_features) is asked last."""


def view(module: nn.Module, root: nn.Module | None = None) -> Layer | None:
    """The view of a module (of the model ``root``) that is a weighted layer, or None."""
    fallback: Layer | None = None
    for name, kind in layers.items():
        found = kind.view(module)
        if found is None:
            continue
        if name != "opaque":
            return found
        found.root = root
        fallback = found
    return fallback


def stamp(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """Differs once any of these tensors was replaced, moved, cast or written into."""
    return tuple((id(t), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors)


def no_factors(kind: str) -> UnsupportedError:
    """Why a low-rank edit cannot act on an elementwise layer."""
    return UnsupportedError(
        f"a {kind} layer multiplies channel by channel; its weight is a vector and has no low-rank factors. "
        "Choose linear, embedding or convolution targets."
    )


def refuse_subclass(module: nn.Module, plain: type[nn.Module]) -> None:
    """A subclass with its own forward computes something we cannot know: refuse rather than guess."""
    if type(module).forward is not plain.forward:
        raise TargetError(
            f"{type(module).__name__} overrides {plain.__name__}.forward, so its map is unknown to Trimtab. "
            "Register a view for it in the entry-point group 'trimtab.frozen'."
        )
