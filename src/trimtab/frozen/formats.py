"""The formats in few bits, by name; and LoftQ's, which says for which factors it rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from trimtab.frozen.affine import AffineLinear
from trimtab.frozen.eightbit import Fp8Linear, Int8Linear
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.loftq import LoftQ
from trimtab.frozen.lowbit import LowBitLinear

Make = Callable[[Tensor, Tensor | None], LowBitLinear]
"""Makes a layer in few bits of a dense weight and a bias."""

FORMATS: Mapping[str, Make] = {
    "nf4": partial(FourBitLinear.of, kind="nf4"),
    "fp4": partial(FourBitLinear.of, kind="fp4"),
    "int4": partial(AffineLinear.of, bits=4),
    "int8": Int8Linear.of,
    "int8-group": partial(AffineLinear.of, bits=8),
    "fp8": Fp8Linear.of,
}
"""Name -> how a layer in that format is made."""


def maker(storage: str, *, plain: bool = False) -> Make:
    """How a layer in a storage is made; ``plain``: in its format alone, for no factors."""
    own = LoftQ.read(storage)
    if own is None:
        return FORMATS[storage]
    return FORMATS[own.kind] if plain else own.round
