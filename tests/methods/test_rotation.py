"""OFT, BOFT and HRA turn the input: norms and angles of the weight's rows stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import OFTConfig
from torch import Tensor, nn

import trimtab as tt
from tests.oracles import kit
from trimtab.adapt.contract import Params
from trimtab.adapt.rotation import Rotation
from trimtab.errors import ConfigError
from trimtab.frozen import view


def shaken(method: Rotation, layer: nn.Module, size: float = 0.3) -> Params:
    seen = view(layer)
    assert seen is not None
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, spec in method.tensors(seen, "").items():
        noise = torch.randn(spec.shape, generator=draw) * size
        found[name] = (spec.init(spec.shape, draw) + noise).double()
    return found


def matrix(method: Rotation, layer: nn.Linear, *, size: float = 0.3, back: bool = False) -> Tensor:
    eye = torch.eye(layer.in_features, dtype=torch.float64)
    return method.turn(shaken(method, layer, size), eye, back=back)


ORTHOGONAL = [
    tt.OFT(block=4, series="exact"),
    tt.OFT(block=4, series="inverse", share=True),
    tt.BOFT(block=4, factors=3),
    tt.HRA(rank=3),
    tt.HRA(rank=4, orthogonal=True),
]


@pytest.mark.parametrize("method", ORTHOGONAL, ids=repr)
def test_the_rotation_is_orthogonal_and_back_is_its_transpose(method: Any) -> None:
    layer = nn.Linear(16, 5)
    r = matrix(method, layer)
    assert float((r - torch.eye(16)).abs().max()) > 0.1
    torch.testing.assert_close(r @ r.T, torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix(method, layer, back=True), r.T, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", [m for m in ORTHOGONAL if not isinstance(m, tt.BOFT)], ids=repr)
def test_norms_and_angles_of_the_rows_stay(method: Any) -> None:
    """So the Frobenius norm and the hyperspherical energy of the weight stay too."""
    model = nn.Sequential(nn.Linear(16, 5)).double()
    before = model[0].weight.detach().clone()
    adapter = tt.attach(model, method.replace(targets=("0",)), "a")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.3)
    after = tt.merge(model.double(), "a")[0].weight.detach()
    assert float((after - before).abs().max()) > 1e-2
    torch.testing.assert_close(after @ after.T, before @ before.T, atol=1e-6, rtol=1e-6)


def test_the_series_of_oft_nears_its_exact_form() -> None:
    layer = nn.Linear(16, 5)
    errors = []
    for size in (0.1, 0.05):
        exact = matrix(tt.OFT(block=4, series="exact"), layer, size=size)
        near = matrix(tt.OFT(block=4), layer, size=size)
        errors.append(float((exact - near).norm()))
    assert errors[0] / errors[1] == pytest.approx(2**4, rel=0.2)  # the last of its terms is Q⁴


def test_the_two_forms_of_peft_are_inverses_of_each_other() -> None:
    """A flag that looks numerical turns the other way in PEFT; here each has its own name."""
    turned = []
    for neumann in (True, False):
        config = OFTConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=neumann)
        theirs = kit.peft_model(lambda: nn.Sequential(nn.Linear(8, 8)), config)
        module = theirs.base_model.model[0].oft_R["default"]
        with torch.no_grad():
            module.weight.fill_(0.01)
            turned.append(module(torch.eye(8)))
    assert float((turned[0] - turned[1]).abs().max()) > 1e-2
    torch.testing.assert_close(turned[0] @ turned[1], torch.eye(8), atol=1e-5, rtol=0)
    exact = matrix(tt.OFT(block=4, series="exact"), nn.Linear(8, 8))
    inverse = matrix(tt.OFT(block=4, series="inverse"), nn.Linear(8, 8))
    torch.testing.assert_close(exact @ inverse, torch.eye(8, dtype=torch.float64))


def test_butterfly_factors_mix_distant_blocks() -> None:
    """With m factors each entry reaches 2^(m−1) blocks; with one it stays in its own."""
    for factors, reach in ((1, 4), (2, 8), (3, 16)):
        r = matrix(tt.BOFT(block=4, factors=factors), nn.Linear(16, 5))
        assert int((r.abs() > 1e-9).sum(1).max()) == reach


def test_constrained_oft_stays_in_its_ball() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = tt.attach(model, tt.OFT(block=4, epsilon=1e-3, targets=("0",)), "a")
    steps = tt.Stepper(adapter)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(0.5)
    steps.after()
    (q,) = adapter.parameters()
    skew_norm = q.norm(dim=-1) * 2**0.5
    torch.testing.assert_close(skew_norm, torch.full((2,), 1e-3 / 2**0.5))


@pytest.mark.parametrize(
    "method", [tt.OFT(block=5), tt.BOFT(block=5), tt.BOFT(block=4, factors=4)], ids=repr
)
def test_a_block_that_does_not_divide_is_refused_with_advice(method: Rotation) -> None:
    model = nn.Sequential(nn.Linear(16, 5))
    with pytest.raises(ConfigError, match=r"16|blocks"):
        tt.attach(model, method.replace(targets=("0",)), "a")


DROPPING = [
    (tt.OFT(block=2, dropout=0.6), 4),
    (tt.OFT(block=2, dropout=0.05), 0),
    (tt.OFT(blocks=8, dropout=0.5, share=True), 0),
    (tt.BOFT(block=2, dropout=0.5), 4),
]


@pytest.mark.parametrize(("method", "gone"), DROPPING, ids=repr)
def test_some_blocks_do_not_turn_in_training(method: Any, gone: int) -> None:
    """A share of them, rounded down, others each time, none in evaluation."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
    adapter = tt.attach(model, method.replace(targets=("0",)), "a")
    with torch.no_grad():
        for name, p in adapter.tensors.items():
            if not name.endswith("boft_s"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    eye = torch.eye(16)
    assert torch.equal(model.eval()(eye), model(eye))
    whole = _still(model(eye))
    assert not whole
    seen = set()
    torch.manual_seed(0)
    for _ in range(6):
        blocks = _still(model.train()(eye))
        assert len(blocks) == gone
        seen.add(tuple(blocks))
        kept = [n for n in range(8) if n not in blocks]
        rows = model(eye)  # what still turns, turns as ever
        again = _still(rows)
        for n in kept:
            if n not in again:
                torch.testing.assert_close(
                    rows[2 * n : 2 * n + 2], model.eval()(eye)[2 * n : 2 * n + 2]
                )
    assert len(seen) > 1 or not gone


def _still(turned: Tensor) -> list[int]:
    """Which blocks of two were not turned."""
    blocks = [turned[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] for n in range(8)]
    return [n for n, block in enumerate(blocks) if torch.allclose(block, torch.eye(2), atol=1e-5)]


def test_of_several_butterfly_factors_one_loses_blocks() -> None:
    method = tt.BOFT(block=4, factors=3, dropout=0.5)
    p = shaken(method, nn.Linear(32, 5))
    torch.manual_seed(0)
    lost = {tuple((method.kept(p)["Q"] == 0).all(-1).all(-1).sum(1).tolist()) for _ in range(30)}
    assert lost == {(4, 0, 0), (0, 4, 0), (0, 0, 4)}


@pytest.mark.parametrize("terms", [2, 3, 5, 6, 9])
def test_more_terms_of_the_series_are_nearer_to_its_sum(terms: int) -> None:
    layer, errors = nn.Linear(16, 5), []
    for size in (0.1, 0.05):
        exact = matrix(tt.OFT(block=4, series="exact"), layer, size=size)
        near = matrix(tt.OFT(block=4, terms=terms), layer, size=size)
        errors.append(float((exact - near).norm()))
    order = max(terms - 1, 2) if terms != 3 else 3  # the last power has half of its weight
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


def test_a_rotation_outside_of_its_ball_is_used_at_its_edge() -> None:
    method = tt.OFT(block=4, epsilon=1e-2)
    far = {"Q": torch.full((4, 6), 0.7, dtype=torch.float64, requires_grad=True)}
    edge = {"Q": torch.full((4, 6), 1e-2 / 2 / 12**0.5, dtype=torch.float64, requires_grad=True)}
    eye = torch.eye(16, dtype=torch.float64)
    turned = [method.turn(p, eye, back=False) for p in (far, edge)]
    torch.testing.assert_close(turned[0], turned[1], atol=1e-12, rtol=0)
    for each in turned:
        (each * torch.arange(256.0).view(16, 16)).sum().backward()
    assert far["Q"].grad is not None
    torch.testing.assert_close(far["Q"].grad, edge["Q"].grad)
    assert tt.OFT(block=4).turn(far, eye, back=False).sub(turned[0]).abs().max() > 0.1
