"""Diff pruning: the gates of its paper, what they cost, and the schedule that makes them sparse for good."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import Params
from trimtab.errors import ConfigError
from trimtab.methods.diff import _gates


def tensors(alpha: float, group: float, gates: float = -1.0) -> Params:
    one = torch.ones(1, 1, dtype=torch.float64)
    return {"w": one, "alpha": one * alpha, "group": one[0] * group, "gates": one * gates}


@pytest.mark.parametrize(("alpha", "group"), [(0.3, 0.2), (-0.2, 1.0), (5.0, 5.0), (-5.0, 5.0)])
def test_gates_are_the_stretched_sigmoids_of_the_paper(alpha: float, group: float) -> None:
    def stretched(logit: float) -> float:
        return min(max(1 / (1 + math.exp(-logit)) * 3.0 - 1.5, 0.0), 1.0)

    found = float(_gates(tensors(alpha, group), 0, 0))
    assert found == pytest.approx(stretched(alpha) * stretched(group))


def test_open_gates_are_sampled_as_often_as_their_cost_says() -> None:
    """P(z > 0) = σ(α − log(−l / r)) = σ(α), for l = −1.5 and r = 1.5."""
    alpha = torch.full((200_000,), -0.4, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    u = torch.rand(alpha.shape, generator=draw, dtype=torch.float64)
    p = {
        "w": alpha,
        "alpha": alpha,
        "group": torch.full((1,), 50.0),
        "gates": torch.full((1,), -1.0),
    }
    share = float((_gates(p, u.log() - (1 - u).log(), 0) > 0).double().mean())
    assert share == pytest.approx(float(torch.sigmoid(alpha[0])), abs=0.01)


def trained(method: tt.DiffPruning, steps: int, total: int | None) -> tuple[nn.Module, tt.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    adapter = tt.attach(model, method, "d").named() and bank_of(model).adapters["d"]
    optimiser = torch.optim.AdamW(tt.parameter_groups(adapter, lr=1e-3))
    steps_of = tt.Stepper(adapter, total=total)
    x, y = torch.randn(64, 12), torch.randint(3, (64,))
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss + sum(value for _, _, value in bank_of(model).take_losses())).backward()
        optimiser.step()
        steps_of.after()
    return model, adapter


def test_at_its_time_exactly_the_wanted_share_stays_and_goes_on_learning() -> None:
    method = tt.DiffPruning(keep=0.1, prune_at=0.5, targets=("0", "2"))
    _, before = trained(method, 9, 20)
    model, at = trained(method, 10, 20)
    _, later = trained(method, 16, 20)
    weights = 12 * 10 + 10 * 3
    gates = torch.cat([t.flatten() for k, t in at.tensors.items() if k.endswith("diff_gates")])
    assert set(gates.tolist()) == {0.0, 1.0} and int(gates.sum()) == round(0.1 * weights)
    soft = [t for k, t in before.tensors.items() if k.endswith("diff_gates")]
    assert all(bool((t == -1).all()) for t in soft)
    for key, value in later.tensors.items():
        if key.endswith("diff_gates"):
            assert torch.equal(value, at.tensors[key])
            w = key.replace("diff_gates", "diff_w")
            moved = (later.tensors[w] - at.tensors[w])[value == 1]
            assert bool((moved != 0).all())
    # What is not kept is the base, bitwise, also after weight decay and more steps.
    merged = tt.merge(model, "d")
    for number in ("0", "2"):
        kept = at.tensors[f"{number}.diff_gates"] == 1
        frozen = model[int(number)].base_layer.weight
        assert torch.equal(merged[int(number)].weight[~kept], frozen[~kept])


def test_the_cost_pushes_gates_shut() -> None:
    heavy = tt.DiffPruning(penalty=1e-1, prune_at=1.0, gate_rate=100, targets=("0", "2"))
    _, adapter = trained(heavy, 30, 1000)
    alphas = torch.cat(
        [t.detach().flatten() for k, t in adapter.tensors.items() if k.endswith("diff_alpha")]
    )
    assert float(alphas.mean()) < 4.0


def test_without_a_number_of_steps_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="how many steps"):
        trained(tt.DiffPruning(targets=("0",)), 1, None)
