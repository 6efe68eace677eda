"""Tiny models of each family, from configs, with random weights, and a batch of four rows for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 97


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY, **sizes, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    return _seeded(lambda: LlamaForCausalLM(config))


def llama_classifier() -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return _seeded(lambda: LlamaForSequenceClassification(config))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _seeded(lambda: GPT2LMHeadModel(config))


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _seeded(lambda: BertForSequenceClassification(config))


def t5(gated: bool = False) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu", dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _seeded(lambda: T5ForConditionalGeneration(config))


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped one of torch has no fp64
    return _seeded(lambda: MixtralForCausalLM(config))


class Mixed(nn.Module):
    """Every dense layer kind: embedding, convolutions in one to three dimensions (one grouped), norms, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.conv1 = nn.Conv1d(16, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=1, padding_mode="circular")
        self.conv3 = nn.Conv3d(1, 3, 2)
        self.norm = nn.LayerNorm(8)
        self.batch_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(1, 2)
        h = self.grouped(torch.tanh(self.conv1(h))).transpose(1, 2)
        h = self.norm(h)
        image = self.batch_norm(self.conv2(h[:, None])).mean((1, 2, 3))
        volume = self.conv3(h.reshape(h.shape[0], 1, -1, 4, 2)).mean((1, 2, 3, 4))
        return self.head(h) + (image + volume)[:, None, None]


def mixed() -> Mixed:
    return _seeded(Mixed)


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make()
    with (
        torch.no_grad()
    ):  # biases and norms start at 0 and 1: give them values, so that errors there show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A model, its inputs (four rows), and how to read its output."""

    name: str
    make: Callable[[], nn.Module]
    rows: int = 4

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return self.make().to(dtype)

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (self.rows, 8), generator=generator)
        if self.name == "mixed":
            return {"x": ids}
        if self.name.startswith("t5"):
            return {
                "input_ids": ids,
                "decoder_input_ids": torch.randint(
                    3, VOCABULARY, (self.rows, 5), generator=generator
                ),
            }
        return {"input_ids": ids}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits."""
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def pick(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in inputs.items()}


CASES = {
    case.name: case
    for case in (
        Case("llama", llama),
        Case("gpt2", gpt2),
        Case("bert", bert),
        Case("t5", t5),
        Case("t5-gated", lambda: t5(gated=True)),
        Case("mixtral", mixtral),
        Case("classifier", llama_classifier),
        Case("mixed", mixed),
    )
}
