"""Tiny models of each family, from configs, with random weights, and a batch of four rows for each."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from trimtab.models.quantise import rounded
from trimtab.models.storage import STORAGES

VOCABULARY = 97
SMALL_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "num_labels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


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


def qwen3() -> Qwen3ForCausalLM:
    return _seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL_DECODER, head_dim=16)))


def qwen3_moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        **SMALL_DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        mlp_only_layers=[0],
    )  # fmt: skip
    config._experts_implementation = "eager"
    return _seeded(lambda: Qwen3MoeForCausalLM(config))


def gemma3() -> Gemma3ForCausalLM:
    """A first block that attends to a window and a second that attends to all; norms multiply by 1 + w."""
    config = Gemma3TextConfig(
        **SMALL_DECODER, head_dim=8, sliding_window=4, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return _seeded(lambda: Gemma3ForCausalLM(config))


def mistral() -> MistralForCausalLM:
    return _seeded(lambda: MistralForCausalLM(MistralConfig(**SMALL_DECODER, sliding_window=5)))


def falcon(**changes: Any) -> FalconForCausalLM:
    """Groups of two queries with a key and a value; attention and MLP side by side."""
    config = FalconConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True, "hidden_dropout": 0.0,
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    return _seeded(lambda: FalconForCausalLM(config))


def bloom() -> BloomForCausalLM:
    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _seeded(lambda: BloomForCausalLM(config))


def roberta() -> RobertaForSequenceClassification:
    return _seeded(lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL_ENCODER)))


def deberta() -> DebertaV2ForSequenceClassification:
    """As DeBERTa v3: relative positions in buckets, normed, through the projections of queries and keys."""
    config = DebertaV2Config(
        **SMALL_ENCODER, relative_attention=True, position_buckets=8, max_relative_positions=-1,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0, pooler_dropout=0.0,
    )  # fmt: skip
    return _seeded(lambda: DebertaV2ForSequenceClassification(config))


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return _seeded(lambda: BartForConditionalGeneration(config))


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _seeded(lambda: ViTForImageClassification(config))


def clip() -> CLIPModel:
    """Two towers of different widths."""
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "max_position_embeddings": 32,
        "eos_token_id": 2,
    }
    vision = {"hidden_size": 24, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, **vision}, projection_dim=16
    )
    return _seeded(lambda: CLIPModel(config))


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


Inputs = dict[str, Tensor]


def _ids(generator: Generator, rows: int, length: int = 8) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def _text(generator: Generator, rows: int) -> Inputs:
    return {"input_ids": _ids(generator, rows)}


def _text_to_text(generator: Generator, rows: int) -> Inputs:
    return {
        "input_ids": _ids(generator, rows),
        "decoder_input_ids": _ids(generator, rows, length=5),
    }


def _image(generator: Generator, rows: int) -> Inputs:
    """A picture is as many numbers a row as the module converts to its own dtype."""
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)}


def _text_and_image(generator: Generator, rows: int) -> Inputs:
    return _text(generator, rows) | _image(generator, rows)


def stored(model: Any, storage: str) -> Any:
    """A model whose linear layers are kept in few bits."""
    rounded(model, storage, ())
    return model


@dataclass(frozen=True)
class Case:
    """A model, its inputs (four rows), and what it can do.

    ``decodes``: it continues its own input (a gate is to see the prompt alone). ``generates``: it has
    ``generate``. ``packs``: documents may lie side by side in a row, told apart by their positions.
    ``blocks``: it is a transformer, whose blocks can be recomputed. ``storage``: how its linear layers are kept (None:
    densely), and ``architecture`` is then the case that keeps them densely.
    """

    name: str
    make: Callable[[], nn.Module]
    given: Callable[[Generator, int], Inputs] = _text
    decodes: bool = False
    packs: bool = False
    blocks: bool = True
    rows: int = 4
    architecture: str = ""
    storage: str | None = None

    @property
    def generates(self) -> bool:
        return self.decodes or self.given is _text_to_text

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A model of its own; a copy, because making one takes most of many a test's time."""
        found = copy.deepcopy(_made(self, dtype))
        torch.manual_seed(0)
        return found

    def inputs(self, seed: int = 0) -> Inputs:
        return self.given(torch.Generator().manual_seed(seed), self.rows)


@functools.cache
def _made(case: Case, dtype: torch.dtype) -> nn.Module:
    return case.make().to(dtype)


def in_few_bits(case: Case, storage: str) -> Case:
    """The same model with its linear layers in a format of few bits."""
    return replace(
        case,
        name=f"{case.name}-{storage}",
        make=lambda: stored(case.make(), storage),
        architecture=case.name,
        storage=storage,
    )


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits; of a model with two towers what each made of its input, side by side. The first axis is rows."""
    out = model(**inputs)
    if isinstance(out, Tensor):
        return out
    return torch.cat([out.text_embeds, out.image_embeds], 1) if "text_embeds" in out else out.logits


def pick(inputs: Inputs, rows: list[int]) -> Inputs:
    return {key: value[rows] for key, value in inputs.items()}


CASES = {
    case.name: case
    for case in (
        Case("llama", llama, decodes=True, packs=True),
        Case("gpt2", gpt2, decodes=True, packs=True),
        Case("bert", bert),
        Case("t5", t5, _text_to_text),
        Case("t5-gated", lambda: t5(gated=True), _text_to_text),
        Case("mixtral", mixtral, decodes=True, packs=True),
        Case("classifier", llama_classifier),
        Case("mixed", mixed, lambda generator, rows: {"x": _ids(generator, rows)}, blocks=False),
        Case("qwen3", qwen3, decodes=True, packs=True),
        Case("qwen3-moe", qwen3_moe, decodes=True, packs=True),
        Case("gemma3", gemma3, decodes=True, packs=True),
        Case("mistral", mistral, decodes=True, packs=True),
        Case("falcon", falcon, decodes=True),  # its mask does not ask for positions
        Case("bloom", bloom, decodes=True),  # it has no positions to give
        Case("roberta", roberta),
        Case("deberta", deberta),
        Case("bart", bart, _text_to_text),
        Case("vit", vit, _image),
        Case("clip", clip, _text_and_image),
    )
}
PAIRED = (
    ("llama", "nf4"), ("gpt2", "int8"), ("bert", "fp8"), ("t5", "fp4"), ("mixtral", "nf4"), ("qwen3-moe", "int8"),
)  # fmt: skip
"""Each format on a model or two: what is always run."""
if os.environ.get("TRIMTAB_LAWS") == "all":  # and then every format on every architecture
    PAIRED = tuple((name, how) for name, case in CASES.items() if case.blocks for how in STORAGES)
CASES |= {case.name: case for case in (in_few_bits(CASES[name], how) for name, how in PAIRED)}
STORED = frozenset(name for name, case in CASES.items() if case.storage is not None)
"""Models whose linear layers are kept in few bits."""
