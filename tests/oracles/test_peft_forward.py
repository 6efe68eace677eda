"""Forward and backward against PEFT, for the methods that it has: the same values in, the same values out."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from tests.oracles import kit
from tests.oracles.cases import CASES, Case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_equal_those_of_peft(case: Case, dtype: torch.dtype) -> None:
    theirs = kit.peft_model(case.make, case.theirs).to(dtype)
    model = case.make()
    adapter = tt.attach(model, case.ours, "default")
    model.to(dtype)
    kit.stir(adapter)
    pairs = kit.paired(adapter, theirs)
    kit.give(pairs)
    batch = kit.batch_of(model)
    assert kit.acts(model, "default", batch)
    kit.assert_same_function(model, theirs, pairs, batch)
