"""Loading a base: what works, and each way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.kit import CHATML
from tests.engine import kit
from trimtab.adapt.attach import attach
from trimtab.errors import ModelError, UnknownNameError
from trimtab.models.load import default_dtype, load, load_tokenizer, stored_dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    base = kit.base()
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder(folder: Path) -> None:
    base = load(folder, dtype="float32")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.name == str(folder)
    assert base.tokenizer.chat_template == CHATML
    want = kit.llama().state_dict()
    assert all(torch.equal(value, want[key]) for key, value in base.model.state_dict().items())
    assert load(folder).model.dtype == default_dtype(torch.device("cpu"))
    assert stored_dtype(folder) == "float32"
    assert load_tokenizer(folder).eos_token == "<|im_end|>"


def test_a_new_head_is_allowed_where_the_task_needs_one(folder: Path) -> None:
    base = load(folder, dtype="float32", task="sequence-classification")
    assert type(base.model).__name__ == "LlamaForSequenceClassification"


def test_padding_is_the_end_token_where_there_is_none(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token", None)
    path.write_text(json.dumps(config))
    assert load_tokenizer(copy).pad_token_id == load_tokenizer(copy).eos_token_id


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights .* download the model again"):
        load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"convert pytorch_model\.bin"):
        load(copy)


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(copy)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    adapter = attach(kit.llama(), "lora(rank=2)", "a")
    adapter.save(tmp_path / "a")
    with pytest.raises(ModelError, match="It is an adapter"):
        load(tmp_path / "a")


def test_torn_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="torn or are not safetensors"):
        load(copy)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match="torn or are not safetensors"):
        load(copy)


def test_missing_and_misshapen_tensors(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lack 1 tensors of the model, e.g. '{name}'"):
        load(copy)
    save_file({**tensors, name: tensors[name][:5].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj|shape"):
        load(copy)


def test_broken_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError):
        load(copy)


def test_no_tokenizer(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError):
        load(copy)


def test_unknown_names(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder here nor a model that the hub gives"):
        load("nobody/nothing-at-all")
    with pytest.raises(ModelError, match="is not a model folder"):
        load(tmp_path / "missing")
    with pytest.raises(ModelError, match="there is no file"):
        load(tmp_path / "missing.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"nope")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(tmp_path / "bad.gguf")
    with pytest.raises(UnknownNameError, match="Did you mean 'causal-lm'"):
        load(folder, task="causallm")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown dtype 'flaot32'. Did you mean 'float32'"):
        load(folder, dtype="flaot32")


def write_gguf(path: Path) -> None:
    """The tiny Llama in llama.cpp's format: its names, and rotary halves interleaved."""
    model, tokenizer = kit.llama(), kit.base().tokenizer
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(16)
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    words += [f"<unused{n}>" for n in range(config.vocab_size - len(words))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_bos_token_id(vocabulary["<|im_end|>"])  # earlier releases cannot do without one
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }  # fmt: skip
    for key, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in key:
                split = value.reshape(count, 2, value.shape[0] // count // 2, value.shape[1])
                value = split.transpose(1, 2).reshape(value.shape)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        writer.add_tensor(key, value.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    base = load(path, dtype="float32")
    assert not any(p.requires_grad for p in base.model.parameters())
    want = kit.llama().state_dict()
    found = base.model.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)
    assert base.tokenizer.decode(base.tokenizer("hello there")["input_ids"]) == "hello there"
