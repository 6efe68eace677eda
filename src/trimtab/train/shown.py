"""The first training examples as calls of the model, for a method that begins from data (EVA, LoRA-GA, FISH)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trimtab.adapt.context import IGNORED
from trimtab.data import Datum
from trimtab.models.load import Base
from trimtab.train.recipe import Recipe
from trimtab.train.sources import read_sources

SHOWN, TOGETHER = 128, 8
"""How many examples of the training data are shown, and how many in a batch."""


def shown_batches(recipe: Recipe, base: Base) -> Iterator[dict[str, Tensor]]:
    """Padded batches with labels; what is not learnt has none. Nothing is read before the first is asked for."""
    config = base.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    sample = read_sources(recipe, base.tokenizer, limit).sample[:SHOWN]
    classes = recipe.task == "sequence-classification"
    for start in range(0, len(sample), TOGETHER):
        data = sample[start : start + TOGETHER]
        ids = [d.tokens if classes else (*d.tokens, d.targets[-1]) for d in data]
        batch = _padded(ids, getattr(config, "pad_token_id", None) or 0)
        if classes:
            yield {**batch, "labels": torch.tensor([datum.targets[-1] for datum in data])}
        else:
            yield {**batch, "labels": _labels(data, batch["input_ids"].shape[1])}


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Ids padded on the right, and the mask."""
    width = max(len(row) for row in rows)
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _labels(data: Sequence[Datum], width: int) -> Tensor:
    """The token of each position that is learnt, as models of transformers want it: not shifted."""
    labels = torch.full((len(data), width), IGNORED)
    for row, datum in enumerate(data):
        learnt = torch.tensor(datum.weights) > 0
        labels[row, 1 : len(datum) + 1] = torch.tensor(datum.targets).where(learnt, IGNORED)
    return labels
