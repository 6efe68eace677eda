"""Bases that arrive in few bits, adapted in place: the package's own layers stay, and the universal rule does the rest.

Each kind is made by the package that defines it, and left out where that is not installed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.engine import kit
from tests.laws.cells import NOT_MERGEABLE, Cell, attached, registered
from tests.tiny import CASES, llama, output
from trimtab.errors import UnsupportedError
from trimtab.frozen import view
from trimtab.frozen.linear import hidden
from trimtab.frozen.opaque import OpaqueLinear

GROUP = 16
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
"""The packers want multiples of 32."""


def package(name: str) -> Any:
    """A package, quietly; a test without it is left out."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    return importlib.import_module(name)


def torchao(config: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        quantisation = package("torchao.quantization")
        model = llama(**SIZES)
        quantisation.quantize_(model.model, getattr(quantisation, config)())
        return model

    return make


def gptqmodel(module: str, kind: str) -> Callable[[], nn.Module]:
    """Each linear layer packed as GPTQ or AWQ does: codes of four bits, a scale and a zero for each group."""

    def make() -> nn.Module:
        layer = getattr(package(f"gptqmodel.nn_modules.qlinear.{module}"), kind)
        model = llama(**SIZES)
        for path, linear in list(model.model.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            out, width = linear.weight.shape
            w_OGK = linear.weight.detach().view(out, width // GROUP, GROUP)
            low, high = w_OGK.amin(-1), w_OGK.amax(-1)
            scales = ((high - low) / 15).half().float()
            zeros = (-low / scales).round().clamp(0, 15)
            codes = ((w_OGK / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
            meant = (codes - zeros[..., None]) * scales[..., None]
            linear.weight = nn.Parameter(meant.flatten(1))
            packed = layer(
                bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=width, out_features=out, bias=False
            )  # fmt: skip
            where = (torch.arange(width) // GROUP).int()
            pack = packed.pack_original if kind == "TorchLinear" else packed.pack
            pack(linear=linear, scales=scales, zeros=zeros, g_idx=where)
            packed.post_init()
            parent, _, child = path.rpartition(".")
            model.model.get_submodule(parent).add_module(child, packed.eval())
        return model

    return make


def bitsandbytes() -> nn.Module:
    """Its modules of eight bits, as a script puts them into a model (checkpoints of it become ours). Those of four
    bits change their layout at the first forward without gradients on a CPU, after which they cannot train."""
    layers = package("bitsandbytes.nn")
    model = llama(**SIZES)
    for path, linear in list(model.model.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        out, width = linear.weight.shape
        new = layers.Linear8bitLt(width, out, bias=False, has_fp16_weights=False)
        new.load_state_dict({"weight": linear.weight.detach()})
        parent, _, child = path.rpartition(".")
        model.model.get_submodule(parent).add_module(child, new.to("cpu").eval())
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-fp8": torchao("Float8WeightOnlyConfig"),
    "bitsandbytes-8": bitsandbytes,
    "gptq": gptqmodel("torch", "TorchLinear"),
    "awq": gptqmodel("torch_awq", "AwqTorchLinear"),
}


ROUNDS = ("bitsandbytes-8",)
"""What it is given is rounded too, so that it is linear only nearly."""


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return KINDS[request.param]().requires_grad_(False)


def linears(model: nn.Module) -> dict[str, OpaqueLinear]:
    views = {n: view(m, model) for n, m in model.named_modules() if n.endswith("_proj")}
    return {name: layer for name, layer in views.items() if isinstance(layer, OpaqueLinear)}


def plain_parts(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model; of those that only stand for others, these."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if hidden(tensor):
            parts, _ = tensor.__tensor_flatten__()
            found |= {f"{name}.{part}": getattr(tensor, part) for part in parts}
        else:
            found[name] = tensor
    return found


def test_every_layer_is_a_linear_map_with_a_dense_weight(
    model: nn.Module, request: pytest.FixtureRequest
) -> None:
    near = 2e-2 if request.node.callspec.params["model"] in ROUNDS else 1e-3
    found = linears(model)
    assert len(found) == 14
    plain = llama(**SIZES)
    for name, layer in found.items():
        weight = layer.dense()
        assert type(weight) is Tensor
        assert layer.dtype == weight.dtype == torch.float32
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer.call(x), x @ weight.T, atol=near, rtol=near)
        off = (weight - plain.get_submodule(name).weight).abs().max()
        assert 0 < off < 0.1 * weight.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_adapts_it(kind: str) -> None:
    for method in registered():
        if method != "full":
            adapts(method, KINDS[kind]().requires_grad_(False), exact=kind not in ROUNDS)


def dense(model: nn.Module) -> nn.Module:
    """The model with the dense weights of its layers in few bits, which round nothing that they are given."""
    twin = copy.deepcopy(model)
    for path, layer in linears(twin).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(layer.dense().clone())
        twin.set_submodule(path, plain)
    return twin.requires_grad_(False).train(model.training)


def adapts(method: str, model: nn.Module, *, exact: bool) -> None:
    """One method: its edit acts, learns and merges; the base is as it was. What merging gives is that of the dense
    weights, also where the layers in few bits give it only nearly."""
    inputs = CASES["llama"].inputs()
    with torch.no_grad():
        base = output(model, inputs)
    held = {name: tensor.clone() for name, tensor in plain_parts(model).items()}
    plain = model if exact else dense(model)
    adapter = attached(Cell(method, "llama"), model)
    edited = expected = output(model, inputs)
    learn = [p for p in adapter.parameters() if p.requires_grad]
    grads = torch.autograd.grad(edited.square().sum(), learn, allow_unused=True)
    assert any(grad is not None and bool(grad.any()) for grad in grads), method
    with torch.no_grad():
        assert not torch.allclose(edited, base), method
        with tt.using(model, None):
            assert torch.equal(output(model, inputs), base), method
        if method not in NOT_MERGEABLE:
            if not exact:
                tt.attach(plain, adapter.detached())
                expected = output(plain, inputs)
                assert (edited - expected).abs().max() < 0.15 * expected.abs().max(), method
            off = output(tt.merge(model, "a"), inputs) - expected
            assert off.abs().max() < (5e-3 if exact else 2e-2) * expected.abs().max(), method
    tt.detach(model, "a")
    now = plain_parts(model)
    assert held.keys() == now.keys(), method
    assert all(torch.equal(now[name], tensor) for name, tensor in held.items()), method


def test_its_codes_are_not_trained_themselves(model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="cannot be trained itself"):
        tt.attach(model, tt.Full(targets="mlp_down"), "a")


def test_a_checkpoint_of_torchao_is_loaded_and_named(tmp_path: Path) -> None:
    quantisation = package("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    base = kit.base()
    base.model.save_pretrained(tmp_path / "dense")
    config = TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.float32
    )
    made.save_pretrained(tmp_path / "int8")
    base.tokenizer.save_pretrained(tmp_path / "int8")
    loaded = tt.load(tmp_path / "int8", dtype="float32")
    assert loaded.storage == "torchao"
    assert linears(loaded.model)
    adapter = tt.attach(loaded.model, tt.LoRA(rank=2), "a")
    ids = torch.arange(3, 11)[None]
    loaded.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
