"""GGUF files: rounded one tensor at a time, or left in their blocks."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import trimtab as tt
from tests.engine import kit
from tests.tiny import SMALL_DECODER, llama
from trimtab.errors import ConfigError
from trimtab.frozen.blocks import BlocksLinear
from trimtab.frozen.experts import ExpertLayer
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.kernels.gguf import OWN, dequantised, kinds
from trimtab.models import gguf_file
from trimtab.models.storage import STORAGES

Kind = gguf.GGMLQuantizationType
NAMES = {
    "mlp.experts.down_proj": "ffn_down_exps.weight", "mlp.gate.": "ffn_gate_inp.", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}  # fmt: skip


def write(path: Path, kind: Kind, *, experts: bool = False) -> None:
    """A small Llama (or Qwen3 MoE) in llama.cpp's format, its matrices in blocks of that type."""
    sizes = {
        "vocab_size": kit.VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }
    model = mixture(**sizes) if experts else llama(**sizes)
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if experts:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    else:
        writer.add_rope_dimension_count(16)
    add_words(writer, config.vocab_size)
    for name, value in named(model, turned=not experts):
        array = value.numpy().copy()
        if value.dim() > 1 and kind != Kind.F32:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mixture(**sizes: int) -> Any:
    """With experts as wide as transformers takes them for: it does not read their width from the file."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{**SMALL_DECODER, **sizes}, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=768
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def add_words(writer: gguf.GGUFWriter, size: int) -> None:
    tokenizer = kit.base().tokenizer
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    words += [f"<unused{n}>" for n in range(size - len(words))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_bos_token_id(vocabulary["<|im_end|>"])


def named(model: Any, *, turned: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors by llama.cpp's names; ``turned``: rotary halves interleaved, as it keeps those of Llama."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, value in model.state_dict().items():
        for part, count in heads.items():
            if turned and part in key:
                split = value.reshape(count, 2, value.shape[0] // count // 2, value.shape[1])
                value = split.transpose(1, 2).reshape(value.shape)
        if key.endswith("gate_up_proj"):
            for name, half in zip(("gate", "up"), value.chunk(2, 1), strict=True):
                yield f"blk.{key.split('.')[2]}.ffn_{name}_exps.weight", half.contiguous()
            continue
        for ours, theirs in NAMES.items():
            key = key.replace(ours, theirs)
        yield key, value


def logits(base: tt.Base) -> Tensor:
    with torch.no_grad():
        out: Tensor = base.model(input_ids=torch.arange(3, 11)[None]).logits
    return out


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0, Kind.Q5_1], ids=lambda k: k.name)
@pytest.mark.parametrize("storage", STORAGES)
def test_rounding_while_reading_is_rounding_what_was_read(
    kind: Kind, storage: Any, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", kind)
    dense = tt.load(tmp_path / "m.gguf", dtype="float32")
    base = tt.load(tmp_path / "m.gguf", dtype="float32", storage=storage)
    assert base.storage == storage
    assert base.tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    layers = {n: m for n, m in base.model.named_modules() if isinstance(m, LowBitLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        expected = FORMATS[storage](dense.model.get_submodule(name).weight, None)
        assert torch.equal(layer.dense(torch.float32), expected.dense(torch.float32))
    for name, value in base.model.state_dict().items():
        if "_proj" not in name:
            assert torch.equal(value, dense.model.state_dict()[name])


def test_experts_are_rounded_while_they_are_read(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.Q8_0, experts=True)
    dense = tt.load(tmp_path / "m.gguf", dtype="float32")
    base = tt.load(tmp_path / "m.gguf", dtype="float32", storage="int8")
    found = {n: m for n, m in base.model.named_modules() if isinstance(m, LowBitExperts)}
    assert len(found) == 2
    for path, module in found.items():
        for name in ("gate_up_proj", "down_proj"):
            for expert in range(4):
                was = ExpertLayer.of(dense.model.get_submodule(path), name, expert).dense()
                expected = FORMATS["int8"](was, None).dense(torch.float32)
                assert torch.equal(ExpertLayer.of(module, name, expert).dense(), expected)
    for name, value in base.model.state_dict().items():
        if ".gate." in name or "norm" in name:
            assert torch.equal(value, dense.model.state_dict()[name])


def test_one_tensor_is_dense_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was unpacked for a layer is gone before the next is read."""
    write(tmp_path / "m.gguf", Kind.Q8_0)
    alive: list[Any] = []
    most: list[int] = []
    real = gguf_file.Lazy.__getitem__

    def watched(self: Any, index: Any) -> Any:
        most.append(sum(one() is not None for one in alive))
        made = real(self, index)
        if made.dim() == 2 and made.shape[0] != kit.VOCABULARY:  # embeddings and head stay dense
            alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(gguf_file.Lazy, "__getitem__", watched)
    tt.load(tmp_path / "m.gguf", dtype="float32", storage="nf4")
    assert len(alive) == 14
    assert max(most) <= 1


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name)
def test_blocks_stay_as_they_are(kind: Kind, tmp_path: Path) -> None:
    if int(kind) not in kinds():
        pytest.skip("this release of transformers does not unpack them with torch")
    write(tmp_path / "m.gguf", kind)
    dense = tt.load(tmp_path / "m.gguf", dtype="float32")
    base = tt.load(tmp_path / "m.gguf", dtype="float32", storage="gguf")
    assert base.storage == "gguf"
    layers = {n: m for n, m in base.model.named_modules() if isinstance(m, BlocksLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.dense(torch.float32), dense.model.get_submodule(name).weight)
        assert layer.bits == {Kind.Q8_0: 8.5, Kind.Q4_0: 4.5, Kind.Q4_1: 5.0}[kind]
    assert torch.equal(logits(base), logits(dense))
    held = {name: b.clone() for name, b in base.model.named_buffers()}
    adapter = tt.attach(base.model, tt.LoRA(rank=2, targets="all-linear"), "a")
    ids = torch.arange(3, 11)[None]
    base.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    edited, merged = logits(base), tt.merge(base.model, "a")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, edited, atol=1e-4, rtol=1e-4)
    tt.detach(base.model, "a")
    assert all(torch.equal(held[name], b) for name, b in base.model.named_buffers())


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_blocks_are_unpacked_as_by_the_gguf_package(kind: int) -> None:
    _, size, _ = kinds()[kind]
    generator = np.random.default_rng(kind)
    rows = generator.integers(0, 256, (6, 3 * size), dtype=np.uint8)
    blocks = rows.reshape(-1, size)
    blocks[:, 0:2] = np.float16(0.01).tobytes()[0], np.float16(0.01).tobytes()[1]
    if kind not in OWN:  # scales at other places: any bytes that are numbers will do
        blocks &= 0x3B
    expected = gguf.dequantize(rows, Kind(kind))
    found = dequantised(torch.from_numpy(rows), kind, torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=1e-5)
    if kind in OWN:
        np.testing.assert_array_equal(found.numpy(), expected)


def test_a_head_of_classes_begins_as_on_any_base(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.Q8_0)
    heads = []
    for storage in (None, "int8"):
        base = tt.load(
            tmp_path / "m.gguf",
            dtype="float32",
            task="sequence-classification",
            labels=["a", "b", "c"],
            storage=storage,
        )
        assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
        heads.append(base.model.score.weight)
    assert torch.equal(*heads)
    assert base.storage == "int8"


def test_exempt_layers_are_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.Q8_0)
    base = tt.load(tmp_path / "m.gguf", storage="gguf", exempt=["down_proj"])
    kinds_of = {
        n.rpartition(".")[2]: type(m) for n, m in base.model.named_modules() if "_proj" in n
    }
    assert kinds_of["down_proj"] is torch.nn.Linear
    assert kinds_of["up_proj"] is BlocksLinear


def test_only_a_gguf_file_has_such_blocks(tmp_path: Path) -> None:
    base = kit.base()
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="leaves the weights of a GGUF file in its blocks"):
        tt.load(tmp_path, storage="gguf")
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "m.gguf", Kind.F32)
    with pytest.raises(ConfigError, match="no weight of this file lies in blocks"):
        tt.load(tmp_path / "plain" / "m.gguf", storage="gguf")
