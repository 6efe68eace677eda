"""Tiny bases and data for the tests of the engine and of what stands on it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.data import kit
from trimtab.data import Datum
from trimtab.kernels import remade
from trimtab.models.load import Base

VOCABULARY = 400


def llama(*, positions: int = 128, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return BertForMaskedLM(config).eval()


def base(model: PreTrainedModel | None = None, *, template: str | None = kit.CHATML) -> Base:
    """A base with the byte-level tokenizer of the data tests."""
    tokenizer = kit.byte_level(template)
    assert len(tokenizer) <= VOCABULARY
    return Base((model or llama()).requires_grad_(False), tokenizer, "tiny")


def datums(count: int = 7, *, seed: int = 0, longest: int = 30) -> list[Datum]:
    """Random texts with a masked prompt and uneven weights."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(4, longest))]
        weights = [0.0, 0.0, *(draw.choice([1.0, 1.0, 0.25, 0.0]) for _ in ids[3:]), 1.0]
        made.append(Datum.causal(ids, weights, origin=f"made.jsonl:{number + 1}"))
    return made


@contextmanager
def noting(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that a step inside keeps for backward, the model's own tensors apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    class Noted(remade._Kept):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()

    with patch.object(remade, "_Kept", Noted):
        yield found


def gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
