"""The tensors of a GGUF file as a model names them, each unpacked only when it is asked for.

transformers knows how llama.cpp names and turns the tensors of each architecture, but unpacks the whole file before it
hands out the first of them. Here the same knowledge is asked one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.kernels.gguf import kinds

WHOLE = ("gpt_oss", "gpt-oss")
"""Architectures one tensor of which becomes several."""


class Blocks:
    """A weight as it lies in the file: rows of blocks, as bytes."""

    def __init__(self, codes_OB: Tensor, kind: int) -> None:
        self.codes = codes_OB
        self.kind = kind

    def to(self, *, device: Any = None, dtype: Any = None) -> Blocks:
        """On a device; the codes have no dtype to change."""
        return Blocks(self.codes if device is None else self.codes.to(device), self.kind)


class Lazy:
    """A tensor that is made when it is read, as transformers reads those of a file."""

    def __init__(self, make: Callable[[], Tensor | Blocks]) -> None:
        self._make = make

    def __getitem__(self, _: Any) -> Tensor | Blocks:
        return self._make()


def tensors(path: Path, model: nn.Module, *, blocks: Collection[str]) -> dict[str, Lazy] | None:
    """Name in the model -> tensor; None where the architecture, or this release of transformers, cannot be read so.

    Args:
        path: the file.
        model: its model, on the meta device.
        blocks: names of the matrices that are to stay in their blocks where these can be unpacked later.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture in WHOLE or _own_reader(architecture):
        return None
    config = theirs.load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    make = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)
    processor = make(config=config)
    names = theirs.get_gguf_hf_weights_map(model, processor)
    found: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if target is not None:
            found.setdefault(target, []).append(tensor)
    plain = make in (theirs.TensorProcessor, theirs.LlamaTensorProcessor)

    def read(target: str) -> Tensor | Blocks:
        members = found[target]
        if target in blocks and plain and len(members) == 1 and _stays(members[0]):
            rows = processor.process(weights=members[0].data, name=members[0].name).weights
            return Blocks(torch.from_numpy(rows.copy()), int(members[0].tensor_type))
        made: dict[str, Any] = {"tensors": {}}
        for tensor in members:
            done = processor.process(
                weights=gguf.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters=made,
            )
            if done.name is not None:
                made["tensors"][target] = torch.from_numpy(done.weights.copy())
        return made["tensors"][target]

    return {target: Lazy(lambda target=target: read(target)) for target in found}  # type: ignore[misc]


def _stays(tensor: Any) -> bool:
    return len(tensor.shape) == 2 and int(tensor.tensor_type) in kinds()


def _own_reader(architecture: str) -> bool:
    """Whether transformers reads it in another way, whose names are others."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return bool(is_gguf_arch_supported(architecture))
