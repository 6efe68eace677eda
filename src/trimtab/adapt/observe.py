"""Looking at the bare model over a few batches, for adapters that begin where data tell them to.

The base is not written, and keeps its flags: gradients are taken of aliases of its weights, which share their
storage and stand in their places for the while. Inputs are decomposed as they come (`trimtab.adapt.pca`);
gradients are summed on the CPU, in fp32 of the size of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.acting import using
from trimtab.adapt.bank import find_bank
from trimtab.adapt.observed import Covariance, Gradients, Inputs, Observation, Observed
from trimtab.adapt.watch_gradients import GradientSums
from trimtab.adapt.watch_inputs import InputWatch
from trimtab.errors import AttachError
from trimtab.frozen import Layer
from trimtab.models.anatomy import Anatomy

Batches = Iterable[Any]
"""Each one call of the model: a mapping is its keyword arguments, anything else its one argument."""


def observe(
    model: nn.Module,
    anatomy: Anatomy,
    wants: Mapping[str, tuple[Sequence[Layer], Observation]],
    batches: Batches | None,
) -> dict[str, list[Observed]]:
    """What the batches show of each layer, by path; experts have one each.

    Args:
        wants: by path, the layer (or those of its experts) and what is asked of it.

    Raises:
        AttachError: no batches.
        DataError: a batch without a loss, or a layer that no batch reaches.
        UnsupportedError: a layer of which this cannot be seen.
    """
    if not wants:
        return {}
    if batches is None:
        raise AttachError(
            "this method begins from data: pass batches to attach, each of them one call of the model "
            "(a dict with input_ids, attention_mask and labels)."
        )
    inputs = {
        path: (layers, w)
        for path, (layers, w) in wants.items()
        if isinstance(w, Inputs | Covariance)
    }
    gradients = {
        path: (layers, w) for path, (layers, w) in wants.items() if isinstance(w, Gradients)
    }
    watch = InputWatch(anatomy, inputs)
    sums = GradientSums(anatomy, gradients)
    bare: AbstractContextManager[None] = (
        nullcontext() if find_bank(model) is None else using(model, None)
    )
    with ExitStack() as stack:
        stack.enter_context(bare)
        stack.enter_context(_evaluating(model))
        stack.enter_context(watch.hooked())
        stack.enter_context(sums.aliased())
        for batch in batches:
            moved = _moved(batch, next(model.parameters()).device)
            for part in _rows(moved) if sums.squared else [moved]:
                watch.batch = part
                with torch.set_grad_enabled(bool(gradients)):
                    out = model(**part) if isinstance(part, Mapping) else model(part)
                if gradients:
                    sums.add(out)
            if not gradients and watch.settled:
                break
    return {**watch.found(), **sums.found()}


# -- batches ------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no running statistics; each module's own flag comes back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _rows(batch: Any) -> Iterator[Any]:
    """The examples of a batch, one by one: the square of a mean is no mean of squares."""
    if not isinstance(batch, Mapping):
        yield from batch.split(1)
        return
    sizes = [v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    for row in range(sizes[0]):
        yield {
            k: v[row : row + 1]
            if isinstance(v, Tensor) and v.dim() and v.shape[0] == sizes[0]
            else v
            for k, v in batch.items()
        }
