"""Initialisations against PEFT's, on the same weights; and the converted form, which PEFT reads.

PEFT takes the first product out of the base's weight. Ours stays as it is and keeps the first factors, so the
functions are the same: W − s B₀A₀ + s B A.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import preprocess_loraga
from torch import Tensor, nn

import trimtab as tt
from tests.oracles import kit

QD = ("q_proj", "down_proj")


def theirs(init: Any, make: kit.Make = kit.llama, **options: Any) -> PeftModel:
    options = {"target_modules": list(QD), "r": 4, "lora_alpha": 6, **options}
    return kit.peft_model(make, LoraConfig(init_lora_weights=init, **options))


def products(parameters: dict[str, Tensor], a: str = "lora_A", b: str = "lora_B") -> list[Tensor]:
    """B A of each site, in the order of the model."""
    firsts = [t for name, t in parameters.items() if f"{a}." in name]
    seconds = [t for name, t in parameters.items() if f"{b}." in name]
    return [(y @ x).detach() for x, y in zip(firsts, seconds, strict=True)]


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_and_olora_are_those_of_peft(init: str, rslora: bool) -> None:
    other = theirs(init, use_rslora=rslora)
    model = kit.llama()
    method = tt.LoRA(rank=4, alpha=6, rslora=rslora, targets=QD, init=init)
    adapter = tt.attach(model, method, "default")
    for ours, peft in zip(
        products(adapter.tensors), products(dict(other.named_parameters())), strict=True
    ):
        kit.assert_close(ours, peft, init)
    _same_function(model, adapter, other)


def test_dora_may_begin_so_as_well() -> None:
    """Its norm is of W − s B₀A₀ + s B A on both sides."""
    other = theirs("pissa", use_dora=True)
    model = kit.llama()
    adapter = tt.attach(model, tt.DoRA(rank=4, alpha=6, targets=QD, init="pissa"), "default")
    _same_function(model, adapter, other)


def test_pissa_of_a_transposed_layer_is_that_of_peft() -> None:
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    other = theirs("pissa", kit.gpt2, **options)
    model = kit.gpt2()
    method = tt.LoRA(rank=4, alpha=6, targets=("c_attn", "c_fc"), init="pissa")
    adapter = tt.attach(model, method, "default")
    for ours, peft in zip(
        products(adapter.tensors), products(dict(other.named_parameters())), strict=True
    ):
        kit.assert_close(ours, peft, "pissa")


def test_iterations_of_pissa_explain_as_much_as_those_of_peft() -> None:
    weights = [kit.llama().get_submodule(path).weight for path in _paths()]
    for niter, most in ((0, 0.3), (4, 0.04)):
        init = f"pissa_niter_{niter}"
        peft = products(dict(theirs(init).named_parameters()))
        adapter = tt.attach(kit.llama(), tt.LoRA(rank=4, alpha=6, targets=QD, init=init), "a")
        exact = products(
            tt.attach(kit.llama(), tt.LoRA(rank=4, alpha=6, targets=QD, init="pissa"), "a").tensors
        )
        for found in (products(adapter.tensors), peft):
            for weight, change, best in zip(weights, found, exact, strict=True):
                left, least = ((weight - 1.5 * one).norm() for one in (change, best))
                assert least * (1 - 1e-5) <= left <= least * (1 + most), init


def _paths() -> list[str]:
    names = dict(kit.llama().named_modules())
    return [path for path in names if path.endswith(QD)]


def test_gaussian_and_orthogonal_draw_as_peft_does() -> None:
    for init in ("gaussian", "orthogonal"):
        torch.manual_seed(5)
        other = theirs(init, target_modules=["q_proj"], layers_to_transform=[0])
        model = kit.llama()
        method = tt.LoRA(rank=4, targets="q_proj", layers=(0,), init=init)
        adapter = tt.attach(model, method, "default")
        drawn = dict(other.named_parameters())
        for slot in ("lora_A", "lora_B"):
            key = f"model.layers.0.self_attn.q_proj.{slot}"
            ours = adapter.tensors[f"{key}.weight"].detach()
            peft = drawn[f"base_model.model.{key}.default.weight"].detach()
            assert bool(ours.any()) == bool(peft.any())
            assert float(ours.std()) == pytest.approx(float(peft.std()), rel=0.25)
        assert float(products(adapter.tensors)[0].abs().max()) < 1e-7  # B A = 0, and so is PEFT's
        assert float(products(drawn)[0].abs().max()) < 1e-6


def batches(model: nn.Module, count: int = 2) -> list[kit.Batch]:
    """Batches with padding on the right and labels on the last tokens."""
    found = []
    for seed in range(count):
        batch = kit.batch_of(model, rows=6, length=12, seed=seed)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :3] = -100
        found.append({**batch, "labels": labels})
    return found


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_of_peft_is_ours_of_that_scale(direction: Any) -> None:
    """Ranks so large that both decompositions are exact; singular vectors are told up to their sign."""
    data = batches(kit.llama())
    config = LoraConfig(
        target_modules=list(QD), r=8, lora_alpha=6, init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale="stable", stable_gamma=16),
    )  # fmt: skip
    base = kit.llama()

    def steps() -> None:
        for batch in data:
            base(**batch).loss.backward()

    with kit.quiet("Full backward hook is firing"):
        preprocess_loraga(base, config, steps)
        other = dict(get_peft_model(base, config).named_parameters())
    init = f"lora-ga(scale='peft', direction='{direction}')"
    model = kit.llama()
    method = tt.LoRA(rank=8, alpha=6, targets=QD, init=init)
    adapter = tt.attach(model, method, "default", batches=data)
    official = tt.LoRA(rank=8, alpha=6, targets=QD, init=f"lora-ga(direction='{direction}')")
    plain = tt.attach(kit.llama(), official, "default", batches=data)
    for key, ours in adapter.tensors.items():
        if "first" in key:
            continue
        slot, _, tail = key.rpartition(".")
        peft = other[f"base_model.model.{slot}.default.{tail}"].detach()
        dim = 1 if "lora_A" in key else 0
        kit.assert_close((ours * peft).sum(dim).abs(), peft.square().sum(dim), key)
        # the authors' scale: both factors alike, and no singular values
        norms = plain.tensors[key].detach().norm(dim=dim)
        kit.assert_close(norms, torch.full_like(norms, 32**0.25 / 16**0.5), key)


def test_eva_of_peft_is_ours() -> None:
    """One batch seen twice, and as many components as there are features, so that both are exact."""
    data = batches(kit.llama(), 1)
    targets = ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(
        target_modules=targets, r=8, lora_alpha=6, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )  # fmt: skip
    with kit.quiet("lora with eva initialization"):
        other = get_peft_model(kit.llama(), copy.deepcopy(config))
        initialize_lora_eva_weights(other, data, show_progress_bar=False)
    model = kit.llama()
    method = tt.LoRA(rank=8, alpha=6, targets=tuple(targets), init="eva")
    adapter = tt.attach(model, method, "default", batches=data)
    drawn = {k: v.detach() for k, v in other.named_parameters() if "lora_A" in k}
    ours = {k: v for k, v in adapter.tensors.items() if "lora_A" in k}
    assert len(drawn) == len(ours) and len({len(v) for v in ours.values()}) > 1
    layers = dict(other.named_modules())
    for key, a_RI in ours.items():
        path = key.removesuffix(".lora_A.weight")
        peft = drawn[f"base_model.model.{path}.lora_A.default.weight"]
        assert a_RI.shape == peft.shape, key
        kit.assert_close((a_RI * peft).sum(1).abs(), torch.ones(len(peft)), key)
        scale = layers[f"base_model.model.{path}"].scaling["default"]
        assert adapter.method.at(path).scaling == pytest.approx(scale)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "pissa_niter_4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_the_form_to_share_and_refuses_the_other(
    init: str, rslora: bool, tmp_path: Path
) -> None:
    model = kit.llama()
    method = tt.LoRA(
        rank=4, alpha=6, rslora=rslora, init=init, targets=("q_proj", "v_proj", "up_proj"),
        rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\..*": 5},
    )  # fmt: skip
    adapter = tt.attach(model, method, "default")
    kit.stir(adapter)
    tt.exported(adapter).save(tmp_path / "shared")
    with kit.quiet():
        other = PeftModel.from_pretrained(kit.llama(), tmp_path / "shared").eval()
    batch = kit.batch_of(model)
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(other, batch), init)
    adapter.save(tmp_path / "own")
    assert tt.Adapter.load(tmp_path / "own") == adapter
    if (
        init != "orthogonal"
    ):  # its factors begin away from zero: on the original base PEFT would be wrong
        with pytest.raises((ValueError, KeyError), match="TRIMTAB_"), kit.quiet():
            PeftModel.from_pretrained(kit.llama(), tmp_path / "own")


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva"])
def test_a_start_that_left_the_base_alone_is_read(init: str, tmp_path: Path) -> None:
    model = kit.llama()
    with kit.quiet("lora with eva initialization"):
        options = {"eva_config": EvaConfig()} if init == "eva" else {}
        other = theirs(init, **options)
        if init == "eva":
            initialize_lora_eva_weights(other, batches(model, 1), show_progress_bar=False)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        other.save_pretrained(tmp_path)
    tt.attach(model, tt.Adapter.load(tmp_path), "loaded")
    batch = kit.batch_of(model)
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(other.eval(), batch), init)


def _same_function(model: nn.Module, adapter: tt.Adapter, other: PeftModel) -> None:
    """The same steps away from the same first factors give the same outputs and gradients."""
    pairs = kit.paired(adapter, other)
    kit.give(pairs)  # the signs of singular vectors are anybody's
    with torch.no_grad():
        for name, tensor in adapter.named().items():
            if name in adapter.fixed:
                trained = name.key.replace("_first", "")
                tensor.copy_(adapter.tensors[trained])
        generator = torch.Generator().manual_seed(2)
        for ours, peft in pairs.values():
            step = torch.randn(ours.shape, generator=generator) * 0.1
            ours.add_(step)
            peft.add_(step)
    batch = kit.batch_of(model)
    kit.assert_same_function(model, other, pairs, batch)
