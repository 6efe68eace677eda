"""Completions: greedy equals transformers' own, rows do not disturb each other, draws repeat."""

from __future__ import annotations

import pytest
import torch

from tests.engine import kit
from trimtab.adapt.acting import using
from trimtab.adapt.attach import attach
from trimtab.engine import Engine, SamplingParams
from trimtab.errors import ConfigError, DataError
from trimtab.methods.lora import LoRA
from trimtab.models.load import Base
from trimtab.optim import AdamParams

PROMPTS = [[5, 9, 11], [70, 80, 90, 100, 110, 120], [33], [5, 9, 11, 12]]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def base() -> Base:
    made = kit.base()
    attach(made.model, LoRA(rank=2), "a")
    attach(made.model, "ia3", "b")
    engine = Engine(made)
    for name in "ab":
        for _ in range(4):
            engine.forward_backward(kit.datums(), name)
            engine.optim_step(name, AdamParams(lr=0.05))
    return made


def test_greedy_rows_of_any_adapter_equal_generate_alone(base: Base) -> None:
    owners = ["a", None, "b", "a"]
    answers = Engine(base, sample_tokens=30).sample(PROMPTS, GREEDY, owners)
    for prompt, owner, answer in zip(PROMPTS, owners, answers, strict=True):
        with using(base.model, owner), torch.no_grad():
            out = base.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=base.tokenizer.eos_token_id,
                pad_token_id=base.tokenizer.pad_token_id,
            )
        assert list(answer.tokens) == out[0, len(prompt) :].tolist()
        assert answer.finish in ("stop", "length")
    assert [answer.prompt for answer in answers] == [0, 1, 2, 3]


def test_draws_repeat_by_seed_and_leave_the_training_generator_alone(base: Base) -> None:
    engine = Engine(base)
    params = SamplingParams(max_tokens=6, temperature=1.5, top_k=50, top_p=0.95, seed=7, n=3)
    before = torch.get_rng_state()
    first = engine.sample(PROMPTS, params, "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.sample(PROMPTS, params, "a") == first
    assert len(first) == 12
    assert [answer.prompt for answer in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({answer.tokens for answer in first[:3]}) > 1
    assert engine.sample(PROMPTS, params.replace(seed=8), "a") != first


def test_stop_strings_end_a_completion(base: Base) -> None:
    engine = Engine(base)
    (free,) = engine.sample(PROMPTS[:1], SamplingParams(max_tokens=12, temperature=0), "a")
    stop = free.text[3:5]
    (stopped,) = engine.sample(
        PROMPTS[:1], SamplingParams(max_tokens=12, temperature=0, stop=(stop,)), "a"
    )
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish == "stop"
    assert len(stopped.tokens) < len(free.tokens)


def test_bad_requests(base: Base) -> None:
    engine = Engine(base)
    with pytest.raises(DataError, match="prompt 1 with max_tokens: 136 tokens"):
        engine.sample([[1], [2] * 128], GREEDY)
    with pytest.raises(DataError, match="prompt 0 is empty"):
        engine.sample([[]], GREEDY)
    for wrong in (-1, kit.VOCABULARY):
        with pytest.raises(DataError, match=f"prompt 1: there is no token {wrong};"):
            engine.sample([[1], [2, wrong]], GREEDY)
    with pytest.raises(ConfigError, match="empty stop"):
        SamplingParams(stop="")
    assert engine.sample([], GREEDY) == []
