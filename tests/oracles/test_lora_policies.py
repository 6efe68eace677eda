"""LoRA+ and LoRA-FA against PEFT's optimisers, and what freezing A saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa
from torch import nn

import trimtab as tt
from tests import tiny
from tests.oracles import kit
from trimtab.adapt.files import WEIGHTS
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import ConfigError
from trimtab.optim.params import AdamParams

QV = ("q_proj", "v_proj")
LR = 1e-3


Both = tuple[Any, nn.Module, tt.Adapter, kit.Pairs]


def both(make: Any, method: tt.LoRA, targets: list[str], **options: Any) -> Both:
    config = LoraConfig(target_modules=targets, r=4, lora_alpha=6, **options)
    theirs = kit.peft_model(make, config)
    model = make()
    adapter = tt.attach(model, method, "default")
    names = {name.key: kit.peft_name(theirs, name) for name in adapter.named()}
    parameters = dict(theirs.named_parameters())
    pairs = {key: (tensor, parameters[names[key]]) for key, tensor in adapter.tensors.items()}
    kit.stir(adapter)
    kit.give(pairs)
    return theirs, model, adapter, pairs


@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_groups_of_lora_plus_are_those_of_peft(bias: Any) -> None:
    method = tt.LoRA(rank=4, alpha=6, plus=16, targets=("query", "value"), bias=bias)
    theirs, _, adapter, pairs = both(kit.bert, method, ["query", "value"], bias=bias)
    optimiser = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}  # fmt: skip
    groups = tt.parameter_groups(adapter, lr=LR, weight_decay=0.1)
    ours = {id(p): group for group in groups for p in group["params"]}
    assert {group["lr"] for group in groups} == {LR, 16 * LR}
    for key, (mine, other) in pairs.items():
        assert ours[id(mine)]["lr"] == pytest.approx(rates[id(other)]), key
        assert ours[id(mine)]["weight_decay"] == pytest.approx(decays[id(other)]), key


def test_of_an_embedding_the_factor_that_starts_at_zero_learns_faster() -> None:
    """PEFT gives both factors of it a rate of their own, 1e-6."""
    method = tt.LoRA(rank=4, alpha=6, plus=16, targets="wte")
    theirs, _, adapter, _ = both(kit.gpt2, method, ["wte"])
    optimiser = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16)
    assert {g["lr"] for g in optimiser.param_groups if g["params"]} == {1e-6}
    assert {key.rpartition(".")[2]: rate for key, rate in adapter.rates.items()} == {
        "lora_embedding_A": 16.0
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_the_steps_of_lora_fa_are_those_of_peft(
    rslora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT projects in bf16 wherever a machine has it; that is put aside here."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    method = tt.LoRA(rank=4, alpha=6, rslora=rslora, frozen_a=True, targets=QV)
    theirs, model, adapter, pairs = both(kit.llama, method, list(QV), use_rslora=rslora)
    theirs.double(), model.double()
    pairs = {key: (adapter.tensors[key], other) for key, (_, other) in pairs.items()}
    kit.give(pairs)
    frozen = {key: t.clone() for key, t in adapter.tensors.items() if ".lora_A." in key}
    assert {p.shape[1] for p in adapter.parameters()} == {4}
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=LR, eps=1e-12, weight_decay=0.0)
    peer = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=LR)
    peer.param_groups[0]["eps"] = 1e-12
    steps, batch = tt.Stepper(adapter), kit.batch_of(model)
    for _ in range(4):
        for side in (model, theirs):
            kit.objective(kit.outputs(side, batch)).backward()
        steps.before()
        optimiser.step(), peer.step()
        optimiser.zero_grad(), theirs.zero_grad()
        for mine, other in pairs.values():
            torch.testing.assert_close(mine, other, atol=1e-7, rtol=0)
    assert all(torch.equal(adapter.tensors[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("targets", [("embed",), ("conv1",), ("grouped",), ("conv2",), ("conv3",)])
def test_the_projection_gives_the_nearest_change_of_the_weight(targets: tuple[str, ...]) -> None:
    """ΔW of the projected step is the gradient of W, projected on what the frozen factor reaches."""
    model = tiny.mixed()
    adapter = tt.attach(model, tt.LoRA(rank=4, frozen_a=True, targets=targets), "a")
    model.double()
    kit.stir(adapter)
    site = model.get_submodule(targets[0])
    weight = site.base_layer.weight.requires_grad_(True)
    model(torch.arange(3, 11)[None]).square().sum().backward()
    tt.Stepper(adapter).before()
    learner = next(iter(adapter.parameters()))
    p = {key.split(".")[1]: t for key, t in adapter.tensors.items()}
    a, b = (p.get(f"lora_{x}") if f"lora_{x}" in p else p[f"lora_embedding_{x}"] for x in "AB")
    step = {id(learner): learner.grad}
    change = site.layer.product(step.get(id(a), a), step.get(id(b), b)) * adapter.method.scaling
    full = site.layer.orient(weight.grad)
    # Of all changes that the frozen factor reaches, none is nearer: what is left is orthogonal to each of them.
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        other = torch.randn(learner.shape, generator=generator, dtype=torch.float64)
        reached = site.layer.product(other, b) if learner is a else site.layer.product(a, other)
        cosine = ((full - change) * reached).sum() / full.norm() / reached.norm()
        assert abs(float(cosine)) < 1e-6


def saved_bytes(method: tt.LoRA) -> int:
    """What backward keeps of a wide layer, but for weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64))
    adapter = tt.attach(model, method, "a")
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *adapter.tensors.values()]}  # fmt: skip
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(100, 256, requires_grad=True)
    y = x * 1.0  # of an earlier layer: nobody else keeps it
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(y)
    return sum(sizes.values())


def test_a_frozen_factor_needs_no_x_in_backward() -> None:
    x = 100 * 256 * 4
    plain = saved_bytes(tt.LoRA(rank=4, targets="0"))
    frozen = saved_bytes(tt.LoRA(rank=4, targets="0", frozen_a=True))
    assert plain >= x > 10 * frozen
    assert abs(plain - frozen - x) < x / 50


def test_they_are_ordinary_lora_in_a_file(tmp_path: Path) -> None:
    from peft import PeftModel

    for name, method in (("plus", tt.LoRA(rank=2, plus=8)), ("fa", tt.LoRA(rank=2, frozen_a=True))):
        model = kit.llama()
        adapter = tt.attach(model, method, "default")
        kit.stir(adapter)
        adapter.save(tmp_path / name)
        batch = kit.batch_of(model)
        with kit.quiet():
            theirs = PeftModel.from_pretrained(kit.llama(), tmp_path / name).eval()
        kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), name)
        assert (tmp_path / name / WEIGHTS).is_file()
        assert tt.Adapter.load(tmp_path / name).method == method
        assert tt.exported(adapter) == adapter


def test_experts_are_projected_each_by_itself() -> None:
    model = tiny.mixtral()
    adapter = tt.attach(model, tt.LoRA(rank=4, frozen_a=True, targets="**.experts.*_proj"), "a")
    kit.stir(adapter)
    tiny.output(model, {"input_ids": torch.arange(3, 40)[None]}).square().sum().backward()
    key = "model.layers.0.mlp.experts.down_proj"
    a, b = adapter.tensors[f"{key}.lora_A.weight"], adapter.tensors[f"{key}.lora_B.weight"]
    before = b.grad.clone()
    tt.Stepper(adapter).before()
    for expert in range(4):
        gram = (a[expert] @ a[expert].T).double()
        expected = before[expert].double() @ torch.linalg.inv(gram) / adapter.method.scaling**2
        torch.testing.assert_close(b.grad[expert].double(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "method",
    [tt.LoRA(rank=4, plus=4), tt.LoRA(rank=4, frozen_a=True), tt.LoRA(rank=4, bits=8)],
    ids=["plus", "frozen", "bits"],
)
def test_the_engine_trains_them(method: tt.LoRA) -> None:
    model = tiny.llama()
    adapter = tt.attach(model, method, "a")
    first = {key: t.detach().clone() for key, t in adapter.tensors.items()}
    engine = Engine(model)
    losses = []
    for _ in range(6):
        losses.append(engine.forward_backward([Datum.causal([3, 4, 5, 6], [0, 1, 1, 1])], "a").mean)
        engine.optim_step("a", AdamParams(lr=1e-2))
    assert losses[-1] < losses[0]
    same = {key for key, t in adapter.tensors.items() if torch.equal(t, first[key])}
    assert same == ({k for k in first if "lora_A" in k} if method.frozen_a else set())


def test_options_that_make_no_sense_are_refused() -> None:
    for options in ({"plus": 0.0}, {"bits": 5}, {"bits": 8, "rank": 2}):
        with pytest.raises(ConfigError):
            tt.LoRA(**options)
