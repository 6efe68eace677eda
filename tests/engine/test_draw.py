"""Draws: what transformers' own processors leave, with the probabilities that they leave it, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimtab.engine import SamplingParams
from trimtab.engine.serve.draw import Row, draw

WAYS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=5),
    SamplingParams(temperature=1.7, top_p=0.8),
    SamplingParams(temperature=1.2, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
    SamplingParams(temperature=0.0, repetition_penalty=2.0),
    SamplingParams(temperature=0.0),
]
SEEN = [3, 11, 3, 17]


def left(logits: Tensor, params: SamplingParams) -> Tensor:
    """(V,) the probabilities that transformers draws from."""
    found = LogitsProcessorList()
    if params.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature:
        found.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        found.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(MinPLogitsWarper(params.min_p))
    scores = found(torch.tensor([SEEN]), logits[None].clone())[0]
    if not params.temperature:
        return torch.nn.functional.one_hot(scores.argmax(), len(scores)).double()
    return scores.double().softmax(-1)


@pytest.mark.parametrize("params", WAYS, ids=str)
def test_draws_have_the_probabilities_of_transformers(params: SamplingParams) -> None:
    torch.manual_seed(1)
    logits = torch.randn(23) * 2
    count = 6000
    generator = torch.Generator().manual_seed(5)
    tokens = draw(logits.expand(count, -1), [Row(params, generator, SEEN)] * count)
    share = torch.bincount(torch.tensor(tokens), minlength=23).double() / count
    wanted = left(logits, params)
    assert not share[wanted == 0].any()
    error = (wanted * (1 - wanted) / count).sqrt()
    assert ((share - wanted).abs() <= 5 * error + 1e-12).all()


def test_a_row_draws_the_same_beside_any_others() -> None:
    torch.manual_seed(2)
    logits = torch.randn(len(WAYS), 50)
    before = torch.get_rng_state()

    def rows() -> list[Row]:
        return [Row(p, torch.Generator().manual_seed(n), SEEN) for n, p in enumerate(WAYS)]

    given = logits.clone()
    together = draw(logits, rows())
    assert torch.equal(logits, given)
    alone = [draw(logits[[n]], [row])[0] for n, row in enumerate(rows())]
    turned = draw(logits.flip(0), rows()[::-1])[::-1]
    assert together == alone == turned
    assert torch.equal(torch.get_rng_state(), before)


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, 500:503] = 0.0
    generator = torch.Generator().manual_seed(0)
    found = {draw(logits, [Row(WAYS[0], generator, [])])[0] for _ in range(200)}
    assert found == {500, 501, 502}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-320])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.5}])
def test_the_colder_the_greedier(temperature: float, cut: dict[str, float]) -> None:
    logits = torch.tensor([[1.0, 30.0, -5.0, 29.0], [-90.0, -80.0, -85.0, -80.5]])
    params = SamplingParams(temperature=temperature, **cut)
    rows = [Row(params, torch.Generator().manual_seed(n), ()) for n in range(2)]
    assert draw(logits, rows) == [1, 1]


def test_a_penalty_that_makes_numbers_infinite_still_draws_a_token() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1e-42)
    row = Row(params, torch.Generator().manual_seed(0), (1,))
    assert draw(torch.tensor([[1.0, 3.0, -5.0]]), [row]) == [1]
