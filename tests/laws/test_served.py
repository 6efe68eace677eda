"""The law of serving: what requests of any mix get together is what each gets alone from `generate`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import trimtab as tt
from tests.data import kit
from tests.laws.cells import Cell, attached, law
from tests.tiny import CASES
from trimtab.engine import Engine, SamplingParams

STEPS = 5
LENGTHS = (8, 3, 6, 7, 1)
NAMES = ("a", None, "b", "other", "a")


@torch.no_grad()
def alone(model: PreTrainedModel, ids: list[int], name: str | None) -> list[int]:
    """The continuation of one prompt, its end token included."""
    with tt.using(model, name):
        out = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=STEPS, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


@law
def test_served_together_is_generated_alone(cell: Cell) -> None:
    # BLOOM's softmax is in fp32, where the mask of fp64 is minus infinity, so that padded rows are no numbers
    model = CASES[cell.model].model(*([torch.float32] if cell.architecture == "bloom" else []))
    rows = CASES[cell.model].inputs()["input_ids"].tolist()
    attached(cell, model, "a")
    attached(cell, model, "b", seed=2)
    attached(Cell("lora", cell.model), model, "other", seed=3)
    prompts = [(rows[n % len(rows)] * 2)[:length] for n, length in enumerate(LENGTHS)]
    engine = Engine(model, kit.byte_level())
    answers = engine.sample(prompts, SamplingParams(max_tokens=STEPS, temperature=0), NAMES)
    for prompt, name, answer in zip(prompts, NAMES, answers, strict=True):
        ends = engine.answering.words.ends
        said = alone(model, prompt, name)
        stop = next((n + 1 for n, token in enumerate(said) if token in ends), len(said))
        assert list(answer.tokens) == said[:stop], name
