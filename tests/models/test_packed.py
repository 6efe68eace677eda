"""Checkpoints of GPTQ, AWQ, compressed-tensors and fp8, read without their packages; against these where installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from tests.engine import kit
from tests.tiny import llama
from trimtab.errors import ConfigError, ModelError
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.eightbit import quantise_blocks
from trimtab.kernels.grouped import packed, unpacked
from trimtab.models.packed import facts, layer

GROUP = 16
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, Tensor]


def package(name: str) -> Any:
    """A package; a test without it is left out."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    return importlib.import_module(name)


def in_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (O, I), scales and zeros (O, G)."""
    w_OGK = weight.view(weight.shape[0], -1, GROUP)
    low, high = w_OGK.amin(-1), w_OGK.amax(-1)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    codes = ((w_OGK / scales[..., None]).round() + zeros[..., None]).clamp(0, 2**bits - 1)
    return codes.flatten(1).int(), scales, zeros.int()


def expected(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None) -> Tensor:
    where = torch.arange(codes.shape[1]) // GROUP if order is None else order
    return (codes - zeros[:, where]) * scales[:, where]


def in_words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(N, M) -> (N, M · bits / 32): bit by bit, as the layouts are documented."""
    per = 32 // bits
    out = torch.zeros(codes.shape[0], codes.shape[1] // per, dtype=torch.int64)
    for place in range(per):
        column = place if order is None else order[place]
        out |= codes[:, column::per].long() << (bits * place)
    return torch.where(out >= 2**31, out - 2**32, out).int()


def gptq(
    weight: Tensor, bits: int = 4, *, less: int = 1, sort: bool = False
) -> tuple[Parts, Tensor]:
    codes, scales, zeros = in_groups(weight, bits)
    order = torch.arange(codes.shape[1]) // GROUP
    if sort:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    parts = {
        "qweight": in_words(codes, bits).T.contiguous(),
        "qzeros": in_words((zeros.T - less) % 2**bits, bits),
        "scales": scales.T.contiguous().half(),
        "g_idx": order.int(),
    }
    return parts, expected(codes, scales, zeros, order)


def awq(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scales, zeros = in_groups(weight, 4)
    parts = {
        "qweight": in_words(codes.T, 4, AWQ),
        "qzeros": in_words(zeros.T, 4, AWQ),
        "scales": scales.T.contiguous().half(),
    }
    return parts, expected(codes, scales, zeros)


def compressed(weight: Tensor, bits: int = 4, *, plain: bool = False) -> tuple[Parts, Tensor]:
    codes, scales, zeros = in_groups(weight, bits)
    parts = {"weight_scale": scales}
    if plain:
        parts["weight"] = (codes - 128).to(torch.int8)
        parts["weight_zero_point"] = (zeros - 128).to(torch.int8)
    else:
        parts["weight_packed"] = in_words(codes, bits)
        parts["weight_zero_point"] = in_words(zeros.T, bits).T.contiguous()
        parts["weight_shape"] = torch.tensor(weight.shape)
    return parts, expected(codes, scales, zeros)


def rows_of_fp8(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def blocks_of_fp8(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scales = quantise_blocks(weight)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * scales[0, 0]


def scheme(form: str, bits: int) -> dict[str, Any]:
    kind = "float" if form == "float-quantized" else "int"
    weights = {"num_bits": bits, "type": kind, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


KINDS: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[Parts, Tensor]]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq),
    "gptq-8": ({"quant_method": "gptq", "bits": 8}, lambda w: gptq(w, 8)),
    "gptq-2": ({"quant_method": "gptq", "bits": 2}, lambda w: gptq(w, 2)),
    "gptq-sorted": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, sort=True)),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, less=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "ct-4": (scheme("pack-quantized", 4), compressed),
    "ct-8": (scheme("pack-quantized", 8), lambda w: compressed(w, 8)),
    "ct-int8": (scheme("int-quantized", 8), lambda w: compressed(w, 8, plain=True)),
    "ct-fp8": (scheme("float-quantized", 8), rows_of_fp8),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, blocks_of_fp8),
}


def write(
    folder: Path, kind: str, change: Callable[[Parts], None] | None = None
) -> dict[str, Tensor]:
    """A checkpoint of a small model, its layers stored so; the weights that these stand for."""
    config, store = KINDS[kind]
    torch.manual_seed(0)
    model = llama(hidden_size=64, intermediate_size=96, num_hidden_layers=2, attention_bias=True)
    model.save_pretrained(folder)
    kit.base().tokenizer.save_pretrained(folder)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        path = name.removesuffix(".weight")
        parts, meant[path] = store(tensors.pop(name).float())
        tensors |= {f"{path}.{part}": value.contiguous() for part, value in parts.items()}
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return meant


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_as_it_is_and_adapted(kind: str, tmp_path: Path) -> None:
    meant = write(tmp_path, kind)
    base = tt.load(tmp_path, dtype="float32")
    assert base.storage == KINDS[kind][0]["quant_method"]
    for path, weight in meant.items():
        stored = base.model.get_submodule(path)
        assert isinstance(stored, LowBitLinear)
        torch.testing.assert_close(stored.dense(torch.float32), weight, atol=1e-7, rtol=1e-6)
        if "self_attn" in path:
            assert stored.bias is not None
            assert stored.bias.any()
    held = {name: b.clone() for name, b in base.model.named_buffers()}
    adapter = tt.attach(base.model, tt.LoRA(rank=2), "a")
    ids = torch.arange(3, 11)[None]
    base.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
        edited = base.model(input_ids=ids).logits
        merged = tt.merge(base.model, "a")
        torch.testing.assert_close(merged(input_ids=ids).logits, edited, atol=1e-4, rtol=1e-4)
    tt.detach(base.model, "a")
    assert all(torch.equal(held[name], b) for name, b in base.model.named_buffers())


@pytest.mark.parametrize(
    ("kind", "bits"), [("gptq", 4.7), ("awq", 5.3), ("ct-4", 6.5), ("gptq-2", 3.3)]
)
def test_it_is_stored_in_the_bits_that_it_came_in(kind: str, bits: float) -> None:
    """Scales of 16 or 32 bits for groups of 16 here; 128 is usual, and costs an eighth of it."""
    config, store = KINDS[kind]
    parts, _ = store(torch.randn(64, 64))
    known = facts(config)
    assert known is not None
    made = layer(config["quant_method"], "x", parts, None, torch.float32, known)
    assert made.bits <= bits + 1


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [("gptq", "scales"), ("awq", "qzeros"), ("ct-4", "weight_scale"), ("fp8", "weight_scale_inv")],
)
def test_what_a_checkpoint_lacks_is_named(kind: str, lacks: str, tmp_path: Path) -> None:
    def without(tensors: Parts) -> None:
        del tensors[f"model.layers.1.mlp.down_proj.{lacks}"]

    write(tmp_path, kind, without)
    with pytest.raises(ModelError, match=f"layers.1.mlp.down_proj: the checkpoint lacks {lacks}"):
        tt.load(tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def torn(tensors: Parts) -> None:
        name = "model.layers.0.mlp.up_proj.weight_packed"
        tensors[name] = tensors[name][:, :-1].contiguous()

    write(tmp_path, "ct-4", torn)
    with pytest.raises(ModelError, match="up_proj: its stored tensors do not fit together"):
        tt.load(tmp_path)


def test_a_form_that_is_not_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "ct-4")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("pack-quantized", "nvfp4-pack-quantized"))
    with pytest.raises(ConfigError, match="a form that Trimtab does not read"):
        tt.load(tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_fill_bytes_and_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 32), dtype=torch.uint8)
    assert packed(codes, bits).shape == (5, 4 * bits)
    assert torch.equal(unpacked(packed(codes, bits), bits), codes)


# -- the packages themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_as_compressed_tensors_packs(bits: int) -> None:
    package("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codes, scales, zeros = in_groups(torch.randn(64, 64), bits)
    weight, half = expected(codes, scales, zeros), 1 << (bits - 1)
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=GROUP, symmetric=False)
    state = {
        "weight": weight, "weight_scale": scales, "weight_zero_point": (zeros - half).to(torch.int8),
    }  # fmt: skip
    form = BaseCompressor.get_value_from_registry("pack-quantized")
    parts = form.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    made = layer("compressed-tensors", "x", parts, None, torch.float32, {})
    torch.testing.assert_close(made.dense(torch.float32), weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "where", "kind"),
    [("gptq", "torch", "TorchLinear"), ("awq", "torch_awq", "AwqTorchLinear")],
)
def test_as_gptqmodel_packs(method: str, where: str, kind: str) -> None:
    made = getattr(package(f"gptqmodel.nn_modules.qlinear.{where}"), kind)(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=64, out_features=96, bias=False
    )  # fmt: skip
    codes, scales, zeros = in_groups(torch.randn(96, 64), 4)
    weight = expected(codes, scales, zeros)
    dense = torch.nn.Linear(64, 96, bias=False)
    dense.weight = torch.nn.Parameter(weight)
    groups = (torch.arange(64) // GROUP).int()
    pack = made.pack_original if method == "gptq" else made.pack
    pack(linear=dense, scales=scales, zeros=zeros, g_idx=groups)
    parts = dict(made.named_buffers())
    known = {"bits": 4, "less": False}
    ours = layer(method, "x", parts, None, torch.float32, known).dense(torch.float32)
    torch.testing.assert_close(ours, weight, atol=1e-6, rtol=1e-6)
