"""Write a model whose linear layers are in few bits as a folder that loads again as it is.

Where all of them are NF4, or all FP4, the folder is as bitsandbytes lays it out, and transformers reads it with that
package. Else each buffer of a layer lies at ``<layer>.weight.<format>.<buffer>``, those of all experts of a parameter
at ``<experts>.<parameter>_<format>.<buffer>``, and the config's ``quantization_config`` says ``trimtab``: such a folder
is read by `trimtab.load` alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.errors import ModelError
from trimtab.frozen import view
from trimtab.frozen.affine import AffineLinear
from trimtab.frozen.eightbit import Fp8Linear, Int8Linear
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.linear import LinearLayer
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.kernels.eightbit import BLOCK as TILE
from trimtab.kernels.fourbit import OUTER, TABLES, FourBit, dynamic_table

BUFFERS: Mapping[str, tuple[str, ...]] = {
    "nf4": ("codes", "scales", "outer", "mean", "block"),
    "fp4": ("codes", "scales", "outer", "mean", "block"),
    "int4": ("codes", "scales", "offsets"),
    "int8": ("codes", "scales"),
    "int8-group": ("codes", "scales", "offsets"),
    "fp8": ("codes", "scales"),
}
"""A format -> what is stored of a layer; of four bits ``outer`` and ``mean`` may be missing."""


def save_base(model: PreTrainedModel, folder: Path) -> None:
    """Write a bare model, densely or in few bits. Raises `OSError` as the disk does."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowBitLinear)}
    experts = {n: m for n, m in model.named_modules() if isinstance(m, LowBitExperts)}
    if not layers and not experts:
        model.save_pretrained(folder)
        return
    foreign = next((layer for layer in layers.values() if layer.kind not in BUFFERS), None)
    if foreign is not None:
        raise ModelError(
            f"layers in {foreign.kind} are read, and not written; merge into dense weights."
        )
    theirs = None if experts else _as_bitsandbytes(model, layers)
    tensors = dict(model.state_dict())
    for path, layer in layers.items():
        for name, _ in layer.named_buffers():
            del tensors[f"{path}.{name}"]
        found = _bitsandbytes(layer) if theirs else _ours(layer)
        tensors |= {f"{path}.{name}": tensor for name, tensor in found.items()}
    for path, module in experts.items():
        for name, _ in module.named_buffers(recurse=False):
            del tensors[f"{path}.{name}"]
        for name in module.formats:
            tensors |= {f"{path}.{name}{end}": t for end, t in _stacked(module, name).items()}
    config: Any = model.config
    kinds = Counter(layer.kind for layer in layers.values())
    kinds.update(kind for module in experts.values() for kind in module.formats.values())
    ours = {"quant_method": "trimtab", "stored": "trimtab", "format": kinds.most_common(1)[0][0]}
    config.quantization_config = theirs or ours
    try:
        model.save_pretrained(folder, state_dict=tensors)
    finally:
        del config.quantization_config


def _as_bitsandbytes(
    model: PreTrainedModel, layers: Mapping[str, LowBitLinear]
) -> dict[str, Any] | None:
    """The ``quantization_config`` of a folder that bitsandbytes can read, if it can."""
    kinds = {layer.kind for layer in layers.values()}
    four = [layer for layer in layers.values() if isinstance(layer, FourBitLinear)]
    nested = {layer.outer is not None for layer in four}
    if len(kinds) != 1 or len(four) != len(layers) or len(nested) != 1:
        return None
    dense = [n for n, m in model.named_modules() if isinstance(view(m), LinearLayer)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kinds.pop(),
        "bnb_4bit_use_double_quant": nested.pop(),
        "bnb_4bit_compute_dtype": str(four[0].compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def _bitsandbytes(layer: LowBitLinear) -> dict[str, Tensor]:
    """The tensors of a layer in four bits, as bitsandbytes names them (see `trimtab.models.stored`)."""
    if not isinstance(layer, FourBitLinear):
        raise AssertionError("chosen because it is one")
    facts: dict[str, Any] = {
        "quant_type": layer.kind,
        "blocksize": layer.block,
        "dtype": str(layer.compute_dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    device = layer.codes.device
    table = torch.tensor(TABLES[layer.kind], device=device)
    found = {
        "weight": layer.codes[:, None],
        "weight.absmax": layer.scales,
        "weight.quant_map": table,
    }
    if layer.outer is not None and layer.mean is not None:
        facts |= {
            "nested_blocksize": OUTER,
            "nested_dtype": "float32",
            "nested_offset": float(layer.mean),
        }
        found["weight.nested_absmax"] = layer.outer
        found["weight.nested_quant_map"] = dynamic_table(device).clone()
    text = json.dumps(facts).encode()
    state = torch.tensor(list(text), dtype=torch.uint8)
    return {**found, f"weight.quant_state.bitsandbytes__{layer.kind}": state}


def _ours(layer: LowBitLinear) -> dict[str, Tensor]:
    """The tensors of a layer as Trimtab names them."""
    found = {name: buffer for name, buffer in layer.named_buffers() if buffer is not None}
    if isinstance(layer, FourBitLinear):
        found["block"] = torch.tensor(layer.block)
    return {f"weight.{layer.kind}.{name}": tensor for name, tensor in found.items()}


def _stacked(module: LowBitExperts, name: str) -> dict[str, Tensor]:
    """The tensors of a parameter of experts, by what is put behind its name. Where a dot followed it, transformers
    would take them for the parameter, and give each expert its own."""
    kind, found = module.formats[name], module.stacks(name)
    one = module.template(name)
    if isinstance(one, FourBitLinear):
        found["block"] = torch.tensor(one.block)
    return {f"_{kind}.{part}": stack for part, stack in found.items()}


PARTS = (*(f"weight.{kind}.{name}" for kind, names in BUFFERS.items() for name in names), "weight")
"""All names that `_ours` gives, and that of a weight that is dense."""
STACKS = tuple(f"_{kind}.{name}" for kind, names in BUFFERS.items() for name in names)
"""All ends that `_stacked` gives."""


def read(
    path: str,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> LowBitLinear:
    """What `_ours` gave, as a layer again.

    Raises:
        ModelError: a tensor is missing, or has another size than the layer.
    """
    kind, tensors = _own(path, "weight.", parts)
    layer = _layer(kind, tensors, shape, bias, dtype)
    if layer is None:
        raise _misfit(path, kind, f"a weight of {shape[0]} × {shape[1]}")
    return layer


def read_stacked(
    path: str, name: str, parts: Mapping[str, Tensor], module: LowBitExperts, dtype: torch.dtype
) -> None:
    """Put what `_stacked` gave of a parameter into the experts at a path again.

    Raises:
        ModelError: a tensor is missing, or has another size than the parameter.
    """
    kind, tensors = _own(f"{path}.{name}", "_", parts)
    stacks = {part: tensor for part, tensor in tensors.items() if part != "block"}
    count, shape = module.num_experts, module.matrix_shape(name)
    layer = None
    if all(stack.dim() and len(stack) == count for stack in stacks.values()):
        first = tensors | {part: stack[0] for part, stack in stacks.items()}
        layer = _layer(kind, first, shape, None, dtype)
    if layer is None:
        wanted = f"{count} experts of {shape[0]} × {shape[1]}"
        raise _misfit(f"{path}.{name}", kind, wanted)
    module.hold(name, layer, stacks)


def _own(path: str, before: str, parts: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The format of a weight, and its tensors by the names of their buffers."""
    kind = next((kind for kind in BUFFERS if f"{before}{kind}.codes" in parts), None)
    if kind is None:
        raise ModelError(f"{path}: the checkpoint lacks its codes; save it again.")
    own = {name: parts.get(f"{before}{kind}.{name}") for name in BUFFERS[kind]}
    missing = [n for n, t in own.items() if t is None and n not in ("outer", "mean")]
    if missing or (own.get("outer") is None) != (own.get("mean") is None):
        lacks = missing[0] if missing else "outer" if own["outer"] is None else "mean"
        raise ModelError(f"{path}: the checkpoint lacks {before}{kind}.{lacks}; save it again.")
    return kind, {name: tensor for name, tensor in own.items() if tensor is not None}


def _misfit(path: str, kind: str, wanted: str) -> ModelError:
    return ModelError(
        f"{path}: its codes and scales in {kind} are not those of {wanted}; save it again."
    )


def _layer(
    kind: str,
    own: Mapping[str, Tensor],
    shape: tuple[int, int],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> LowBitLinear | None:
    """A layer of its buffers; None where their sizes do not fit."""
    codes, scales, (rows, columns) = own["codes"], own["scales"], shape
    if kind in TABLES:
        packed = FourBit(
            kind, shape, codes, scales, own.get("outer"), own.get("mean"), int(own["block"])
        )
        return FourBitLinear(packed, bias, dtype) if packed.whole else None
    if kind == "int8":
        whole = tuple(codes.shape) == shape and scales.shape == (rows,)
        return Int8Linear(codes, scales, bias, dtype) if whole else None
    if kind == "fp8":
        tiles = (-(-rows // TILE), -(-columns // TILE))
        whole = tuple(codes.shape) == shape and tuple(scales.shape) == tiles
        return Fp8Linear(codes, scales, bias, dtype) if whole else None
    bits, offsets = 4 if kind == "int4" else 8, own["offsets"]
    held = codes.shape[1] * (8 // bits)
    whole = codes.shape[0] == rows and scales.shape == offsets.shape and scales.shape[0] == rows
    if not whole or held % scales.shape[1] or not 0 <= held - columns < held // scales.shape[1]:
        return None
    return AffineLinear((codes, scales, offsets), columns, bits, bias, dtype)
