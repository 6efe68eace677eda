"""The formats in few bits, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from trimtab.frozen.affine import AffineLinear
from trimtab.frozen.eightbit import Fp8Linear, Int8Linear
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.lowbit import LowBitLinear

FORMATS: Mapping[str, Callable[[Tensor, Tensor | None], LowBitLinear]] = {
    "nf4": partial(FourBitLinear.of, kind="nf4"),
    "fp4": partial(FourBitLinear.of, kind="fp4"),
    "int4": partial(AffineLinear.of, bits=4),
    "int8": Int8Linear.of,
    "int8-group": partial(AffineLinear.of, bits=8),
    "fp8": Fp8Linear.of,
}
"""Name -> how a layer in that format is made of a dense weight and a bias."""
