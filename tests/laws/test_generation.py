"""The laws where a model generates: caches, beams, left padding, rows of different adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.laws.cells import Cell, attached, law
from tests.tiny import CASES
from trimtab.errors import RouteError

STEPS = 5


def generate(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """Tokens of the continuation alone, always ``STEPS`` of them."""
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **options}
    out: Tensor = model.generate(
        input_ids=ids, attention_mask=settings.pop("mask", torch.ones_like(ids)), **settings
    )
    return out[:, -STEPS:]


@law
@torch.no_grad()
def test_mixed_rows_generate_as_each_alone(cell: Cell) -> None:
    model = CASES[cell.model].model()
    ids = CASES[cell.model].inputs()["input_ids"]
    attached(cell, model, "a")
    attached(cell, model, "b", seed=2)
    names = ["a", None, "b", "a"]
    with tt.rows(model, names):
        together = generate(model, ids)
    for row, name in enumerate(names):
        with tt.using(model, name):
            assert torch.equal(together[row], generate(model, ids[[row]])[0]), f"row {row} ({name})"


@law
@torch.no_grad()
def test_beams_of_mixed_rows_are_the_beams_of_each_alone(cell: Cell) -> None:
    model = CASES[cell.model].model()
    ids = CASES[cell.model].inputs()["input_ids"]
    attached(cell, model, "a")
    names = ["a", None, "a", "a"]
    with tt.rows(model, names):
        together = generate(model, ids, num_beams=3)
    for row, name in enumerate(names):
        with tt.using(model, name):
            assert torch.equal(together[row], generate(model, ids[[row]], num_beams=3)[0]), (
                f"row {row} ({name})"
            )


@law
@torch.no_grad()
def test_a_cache_changes_nothing(cell: Cell) -> None:
    """Greedy tokens with a cache are those of running the whole text anew for each token."""
    model = CASES[cell.model].model()
    ids = CASES[cell.model].inputs()["input_ids"]
    attached(cell, model)
    with_cache = generate(model, ids)
    if cell.value().needs_prompt and CASES[cell.model].decodes:
        # Without a cache a gate has nowhere to keep its decision, so every step would decide anew
        # from a longer text; that the cached decision is the prompt's is tested below.
        return
    assert torch.equal(with_cache, generate(model, ids, use_cache=False))


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_gate_decides_from_the_prompt_alone(model_name: str) -> None:
    """A generation keeps the decision of its prompt, also where the model makes the cache itself."""
    from trimtab.adapt.bank import bank_of

    case = CASES[model_name]
    model, ids = case.model(), case.inputs()["input_ids"]
    adapter = attached(Cell("spottune", model_name), model, "gate")
    with torch.no_grad():  # a policy that does look at its input
        for key, tensor in adapter.tensors.items():
            if key.startswith("policy.up"):
                tensor.normal_(generator=torch.Generator().manual_seed(4)).mul_(9)
    out = model(ids, use_cache=True)
    memories = bank_of(model)._memories
    first = next(iter(memories[out.past_key_values].values())).clone()
    assert 0 < float(first.mean()) < 1, "some gates are open and some are not"
    for _ in range(3):
        out = model(
            out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True
        )
        assert torch.equal(next(iter(memories[out.past_key_values].values())), first)


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_gate_refuses_a_cache_that_began_without_it(model_name: str) -> None:
    case = CASES[model_name]
    model, ids = case.model(), case.inputs()["input_ids"]
    attached(Cell("spottune", model_name), model, "gate")
    with tt.using(model, None):
        first = model(ids, use_cache=True)
    with tt.using(model, "gate"), pytest.raises(RouteError, match="without it"):
        model(ids[:, :1], past_key_values=first.past_key_values, use_cache=True)


@law
@torch.no_grad()
def test_left_padding_changes_nothing(cell: Cell) -> None:
    # fp32: BLOOM takes its softmax in fp32, where the least number of fp64 is minus infinity
    model = CASES[cell.model].model(torch.float32)
    ids = CASES[cell.model].inputs()["input_ids"]
    attached(cell, model)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids[:2]], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids[:2])], 1)
    longer = torch.cat([ids[2:], ids[2:, :3]], 1)
    with tt.rows(model, ["a", "a", None, "a"]):
        both = torch.cat([mask, torch.ones_like(longer)])
        together = generate(model, torch.cat([padded, longer]), mask=both, pad_token_id=0)
    with tt.using(model, "a"):
        assert torch.equal(together[:2], generate(model, ids[:2]))
        assert torch.equal(together[3:], generate(model, longer[1:]))


@pytest.mark.parametrize("method", ["lora", "prefix", "ia3"])
@torch.no_grad()
def test_a_static_cache_changes_nothing(method: str) -> None:
    cell = Cell(method, "llama")
    model = CASES["llama"].model(torch.float32)
    ids = CASES["llama"].inputs()["input_ids"]
    attached(cell, model)
    with tt.rows(model, ["a", None, "a", None]):
        plain = generate(model, ids)
        options = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(plain, generate(model, ids, **options))


@torch.no_grad()
def test_a_batch_of_the_wrong_size_is_refused() -> None:
    model, ids = CASES["llama"].model(), CASES["llama"].inputs()["input_ids"]
    attached(Cell("lora", "llama"), model, "a")
    with tt.rows(model, ["a", None]), pytest.raises(RouteError, match="4 rows"):
        model.train()(ids)
