"""Whether documents that share a row stay apart in a model: seen on a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.adapt import attention
from trimtab.adapt.attend import OURS
from trimtab.adapt.documents import DOCUMENTS, Documents, apart


@torch.no_grad()
def separates(model: PreTrainedModel, vocabulary: int, *, told: bool = False) -> bool:
    """Whether positions that restart keep packed documents apart in this model; or, where its attention is ``told`` of
    them, that does.

    Change the first of two documents and see whether the second one's outputs change. Where nothing
    leaks they are bitwise the same; where rounding depends on the batch (experts) the change is far
    smaller than in one running text. On CUDA a kernel of torch's has to do it: a mask is no gain over the model's own.
    """
    device = next(model.parameters()).device
    implementation = model.config._attn_implementation
    if told and implementation not in ("sdpa", OURS["sdpa"]):
        return False
    by_kernel = told and _masks(device)
    documents = Documents((6, 12)) if told else None
    ids = (torch.arange(3 * 6, device=device) * 7 + 5) % vocabulary
    first, other, second = ids.split(6)
    runs = torch.arange(6, device=device).repeat(2)[None]
    joined = torch.arange(12, device=device)[None]

    def change(positions: Tensor, documents: Documents | None) -> float:
        more: dict[str, Any] = {} if documents is None else {DOCUMENTS: documents}
        outputs = []
        for head in (first, other):
            both = torch.cat([head, second])[None]
            with attention.Ours(model), apart(documents):
                out = model(input_ids=both, position_ids=positions, use_cache=False, **more)
            outputs.append(out[0][0, 6:])
        return float((outputs[0] - outputs[1]).abs().max())

    training = model.training
    try:
        model.eval()
        leak = change(runs, documents)
        if by_kernel and documents is not None and documents.masked:
            return False
        return leak == 0.0 or leak < 0.1 * change(joined, None)
    except TypeError:  # it takes no position ids, or hands no further word on
        return False
    except RuntimeError:
        if by_kernel:  # torch's kernel was not built for this GPU
            return False
        raise
    finally:
        model.train(training)


def _masks(device: torch.device) -> bool:
    """Whether attention that is told of documents makes a mask of them there, where torch's kernel does not take it."""
    return device.type == "cuda"
