"""Checkpoints of GPTQ, AWQ, compressed-tensors and block-wise fp8, read without the packages that wrote them.

Their codes and scales go into our own layers (`trimtab.frozen.grouped`); only the packing of the codes changes. O
outputs, I inputs, G groups of inputs, b bits:

    GPTQ    qweight (I·b/32, O), qzeros (G, O·b/32), scales (G, O), g_idx (I); zeros are stored less one, but not in
            its second format
    AWQ     qweight (I, O/8), qzeros (G, O/8), scales (G, O); the codes in a word are those of outputs 0 2 4 6 1 3 5 7
    compressed-tensors    weight_packed (O, I·b/32), weight_scale (O, G), weight_zero_point (O·b/32, G), weight_shape;
            or ``weight`` (O, I) in int8 or fp8 with weight_scale for each row, group or block, or one for all
    fp8     weight (O, I) and weight_scale_inv, a scale for each block of 128 × 128

The words have 32 bits with the first code in the lowest. Layers may quantise what they are given too (``W8A8``): this
is left out, and only the weight is as it was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ModelError
from trimtab.frozen.eightbit import Fp8Linear
from trimtab.frozen.grouped import GroupedLinear
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.eightbit import BLOCK
from trimtab.kernels.grouped import Grouped, packed, words

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of eight outputs lies."""
READABLE = (2, 4, 8)
"""Bits that fill bytes."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx", "weight"),
    "awq": ("qweight", "qzeros", "scales", "weight"),
    "compressed-tensors": (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight",
    ),
    "fp8": ("weight_scale_inv", "weight"),
}  # fmt: skip
"""Method -> names of the tensors of a weight."""
_WANTED = {
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_scale",),
    "fp8": ("weight_scale_inv", "weight"),
}


def facts(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What must be known to read a checkpoint with this ``quantization_config``; None where it is not read here."""
    method = config.get("quant_method")
    if method == "gptq":
        form = config.get("checkpoint_format", config.get("format", "gptq"))
        known = form in ("gptq", "gptq_v2") and config.get("bits") in READABLE
        return {"bits": config["bits"], "less": form == "gptq"} if known else None
    if method == "awq":
        form = str(config.get("version", config.get("format", "gemm"))).lower()
        return {"bits": 4} if form == "gemm" and config.get("bits", 4) == 4 else None
    if method == "compressed-tensors":
        groups = config.get("config_groups") or {}
        forms = [g.get("format") or config.get("format") for g in groups.values()]
        return {} if forms and all(map(_known, forms, groups.values())) else None
    if method == "fp8":
        return {} if list(config.get("weight_block_size") or ()) == [BLOCK, BLOCK] else None
    return None


def _known(form: str | None, group: Mapping[str, Any]) -> bool:
    bits = (group.get("weights") or {}).get("num_bits")
    if form == "pack-quantized":
        return bits in READABLE
    return form in ("int-quantized", "float-quantized", "naive-quantized") and bits == 8


def layer(
    method: str,
    path: str,
    parts: Mapping[str, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    known: Mapping[str, Any],
) -> LowBitLinear:
    """The layer at a path from its stored tensors.

    Raises:
        ModelError: a tensor is missing, or they do not fit together.
    """
    for name in _WANTED[method]:
        if name not in parts:
            raise ModelError(f"{path}: the checkpoint lacks {name}; download it again.")
    if method == "fp8":
        return Fp8Linear(parts["weight"], parts["weight_scale_inv"].float(), bias, dtype)
    read: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Grouped]] = {
        "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed,
    }  # fmt: skip
    try:
        weight = read[method](parts, known)
        weight.check()
        return GroupedLinear(method, weight, bias, dtype)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        text = str(error).splitlines()[0]
        raise ModelError(f"{path}: its stored tensors do not fit together ({text}).") from error


def _gptq(parts: Mapping[str, Tensor], known: Mapping[str, Any]) -> Grouped:
    bits, scales = int(known["bits"]), parts["scales"].T.contiguous()
    codes_OI = words(parts["qweight"].T.contiguous(), bits).flatten(1)
    zeros_GO = words(parts["qzeros"], bits).flatten(1)[:, : scales.shape[0]]
    if known["less"]:
        zeros_GO = (zeros_GO + 1) & ((1 << bits) - 1) if bits < 8 else zeros_GO + 1
    order = _order(parts.get("g_idx"), codes_OI.shape[1], scales.shape[1])
    return Grouped(packed(codes_OI, bits), bits, scales, zeros_GO.T.contiguous(), order=order)


def _awq(parts: Mapping[str, Tensor], known: Mapping[str, Any]) -> Grouped:
    codes_IO = words(parts["qweight"], 4)[..., AWQ_ORDER].flatten(1)
    zeros_GO = words(parts["qzeros"], 4)[..., AWQ_ORDER].flatten(1)
    codes = packed(codes_IO.T.contiguous(), 4)
    return Grouped(codes, 4, parts["scales"].T.contiguous(), zeros_GO.T.contiguous())


def _compressed(parts: Mapping[str, Tensor], known: Mapping[str, Any]) -> Grouped:
    if "weight_packed" not in parts:
        return _compressed_bytes(parts)
    out, width = parts["weight_shape"].tolist()
    bits = parts["weight_packed"].shape[1] * 32 // width
    codes_OI = words(parts["weight_packed"], bits).flatten(1)[:, :width]
    scales, order = _scales(parts["weight_scale"], out, width)
    order = _order(parts.get("weight_g_idx"), width, scales.shape[1]) if order is None else order
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        zeros = words(zeros.T.contiguous(), bits).flatten(1)[:, :out].T.contiguous()
    return Grouped(packed(codes_OI.contiguous(), bits), bits, scales, zeros, 1 << (bits - 1), order)


def _compressed_bytes(parts: Mapping[str, Tensor]) -> Grouped:
    weight = parts["weight"]
    scales, order = _scales(parts["weight_scale"], *weight.shape)
    if weight.is_floating_point():
        return Grouped(weight, 8, scales, order=order)
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        zeros, _ = _scales(zeros, *weight.shape)
        zeros = (zeros.int() + 128).to(torch.uint8)
    codes = (weight.int() + 128).to(torch.uint8)
    return Grouped(codes, 8, scales, zeros, 128, order)


def _scales(scales: Tensor, out: int, width: int) -> tuple[Tensor, Tensor | None]:
    """One for all, for each row, each group or each block -> (O, G), and the group of each column where the last is
    short."""
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales
    scales = scales[:, None] if scales.dim() == 1 else scales
    if scales.shape[0] != out:
        scales = scales.repeat_interleave(-(-out // scales.shape[0]), 0)[:out]
    groups = scales.shape[1]
    if width % groups == 0:
        return scales.contiguous(), None
    size = BLOCK if -(-width // BLOCK) == groups else -(-width // groups)
    return scales.contiguous(), torch.arange(width, device=scales.device) // size


def _order(given: Tensor | None, width: int, groups: int) -> Tensor | None:
    """The group of each column, or None where they lie in order."""
    if given is None or int(given.min()) < 0:
        return None
    plain = torch.arange(width, device=given.device) // (width // groups)
    return None if torch.equal(given.long(), plain) else given.long()
