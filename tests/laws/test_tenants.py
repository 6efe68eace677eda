"""Trained together is trained alone, in the engine: methods, targets, losses and random numbers of its own for each."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.laws.cells import REFUSED, Cell, attached, registered
from tests.tiny import CASES
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.engine.aims import Aim
from trimtab.losses import DPO, ImportanceSampling
from trimtab.optim import CrossEntropy

MODEL = "llama"
NAMES = [name for name in registered() if (name, MODEL) not in REFUSED]
LOSSES: tuple[Aim, ...] = (CrossEntropy(label_smoothing=0.1), ImportanceSampling(), DPO(beta=0.5))


def texts(count: int) -> list[Datum]:
    """Of one length, so that what is drawn at random does not depend on the layout."""
    draw = random.Random(0)
    return [
        Datum.causal(
            [draw.randrange(3, 97) for _ in range(8)],
            [0.0, 0.0, 0.0, *(draw.choice([0.5, 1.0]) for _ in range(5))],
            logprobs=[draw.gauss(-4.5, 0.5) for _ in range(8)],
            advantages=[draw.gauss(0, 1) for _ in range(8)],
        )
        for _ in range(count)
    ]


def engine_with(names: list[str], *, packed: bool) -> Engine:
    model = CASES[MODEL].model()
    for name in names:
        attached(Cell(name, MODEL), model, name, seed=NAMES.index(name))
    torch.manual_seed(1)
    return Engine(model, packed=packed)


def gradients(engine: Engine, name: str) -> dict[str, Tensor | None]:
    tensors = engine._tenant(name).adapter.tensors
    return {key: tensor.grad for key, tensor in tensors.items()}


@pytest.mark.parametrize("method", NAMES)
def test_each_of_several_trains_as_alone(method: str) -> None:
    place = NAMES.index(method)
    packed = place % 2 == 0
    names = [NAMES[(place + step) % len(NAMES)] for step in (0, 1, 2)]
    aims = {name: LOSSES[(place + step) % 3] for step, name in enumerate(names)}
    data, owners = texts(12), names * 4
    together = engine_with(names, packed=packed)
    plan = list(together.micro_batches(data, owners))
    assert len(plan) == 1 and plan[0].packed == packed
    result = together.forward_backward(data, owners, [aims[owner] for owner in owners])
    alone = engine_with([method], packed=packed)
    mine = alone.forward_backward(data[::3], method, aims[method])
    assert result.losses[::3] == pytest.approx(mine.losses, rel=1e-6)
    for key, gradient in gradients(alone, method).items():
        other = gradients(together, method)[key]
        assert (gradient is None) == (other is None), key
        if gradient is not None and other is not None:
            torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6, msg=key)
