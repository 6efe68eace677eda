"""LoRA+ and LoRA-FA: groups and steps equal to PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import peft.optimizers
import peft.optimizers.lorafa as peft_fa
import pytest
import torch
from torch import nn

import trimtab as tt
import trimtab.peft as face
from tests import tiny
from tests.peft.kit import IDS, both, made, quiet
from trimtab.errors import ConfigError, UnsupportedError
from trimtab.peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "rslora": {**PLAIN, "use_rslora": True},
    "patterns": {**PLAIN, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "dora": {**PLAIN, "use_dora": True},
    "embedding": {**PLAIN, "target_modules": ["q_proj", "embed_tokens"]},
    "head": {**PLAIN, "modules_to_save": ["lm_head"]},
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def compared(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    others = dict(theirs.named_parameters())
    moved = 0
    for name, parameter in ours.named_parameters():
        if name in others:
            torch.testing.assert_close(parameter, others[name], atol=tolerance, rtol=tolerance)
            moved += "lora_" in name
    assert moved


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loraplus_groups_and_steps_are_pefts(case: dict[str, Any]) -> None:
    options = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1,
               "loraplus_lr_embedding": 2e-4, "betas": (0.8, 0.9)}  # fmt: skip
    theirs, ours = both({"default": case})
    theirs_made = peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, **options)
    made_here = create_loraplus_optimizer(ours, torch.optim.AdamW, **options)  # type: ignore[arg-type]
    assert type(made_here) is torch.optim.AdamW
    groups = []
    for model, optimizer in ((theirs, theirs_made), (ours, made_here)):
        names = {id(p): name for name, p in model.named_parameters()}
        groups.append(
            [
                ({names[id(p)] for p in g["params"]}, {k: v for k, v in g.items() if k != "params"})
                for g in optimizer.param_groups
            ]
        )
    assert groups[0] == groups[1] or "modules_to_save" in str(groups[1])
    for _ in range(3):
        step(theirs, theirs_made)
        step(ours, made_here)
    compared(ours, theirs, 1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["plain", "rslora", "patterns", "head"])
def test_lorafa_steps_are_pefts(name: str, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT multiplies with the inverse in bf16 where the machine can; here, and in this test, in fp32."""
    monkeypatch.setattr(peft_fa, "is_bf16_available", lambda: False)
    theirs, ours = both({"default": CASES[name]})
    theirs_made = peft_fa.create_lorafa_optimizer(theirs, 4, 8, 1e-3, decay)
    if name == "rslora":
        made_here = create_lorafa_optimizer(ours, 4, 8, 1e-3, decay, use_rslora=True)
    else:
        made_here = create_lorafa_optimizer(ours, 4, 8, 1e-3, decay)
    frozen = {n for n, p in ours.named_parameters() if "lora_A" in n and not p.requires_grad}
    assert frozen == {n for n, _ in ours.named_parameters() if "lora_A" in n}
    before = copy.deepcopy(dict(ours.named_parameters()))
    for _ in range(4):
        step(theirs, theirs_made)
        step(ours, made_here)
    compared(ours, theirs, 2e-5)
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in ours.named_parameters() if p.requires_grad}


def test_lorafa_says_the_scaling_of_each_layer() -> None:
    ours = made(face, {"default": CASES["patterns"]})
    group = create_lorafa_optimizer(ours, 4, 8, 1e-3).param_groups[0]
    said = {
        n.split(".")[-4]: s for n, s in zip(group["names"], group["scaling_factors"], strict=True)
    }
    assert said == {"q_proj": 0.75, "v_proj": 4.0}


def test_lorafa_resumes() -> None:
    runs = []
    for stops in (False, True):
        model = made(face, {"default": PLAIN})
        optimizer = create_lorafa_optimizer(model, 4, 8, 1e-3)
        for number in range(4):
            if stops and number == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = create_lorafa_optimizer(model, 4, 8, 1e-3)
                optimizer.load_state_dict(state)
            step(model, optimizer)
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_lorafa_trains_the_factor_of_an_embedding_that_starts_at_zero() -> None:
    """PEFT trains the other one, whose gradient is zero."""
    config = face.LoraConfig(target_modules=["embed_tokens"])
    model = face.get_peft_model(tiny.llama(num_hidden_layers=1), config)
    optimizer = create_lorafa_optimizer(model, 8, 8, 1e-3)
    (name,) = optimizer.param_groups[0]["names"]
    assert "lora_embedding_A" in name
    step(model, optimizer)
    assert bool(dict(model.named_parameters())[name].any())


def test_what_does_not_fit() -> None:
    model = made(face, {"default": PLAIN})
    with pytest.warns(UserWarning, match="which hold"):
        create_lorafa_optimizer(model, 8, 8, 1e-3)
    with pytest.raises(ConfigError, match="use_rslora"):
        create_lorafa_optimizer(model, 4, 8, 1e-3, use_rslora=True)
    with pytest.raises(ConfigError, match="betas"):
        type(create_lorafa_optimizer(model, 4, 8, 1e-3))({}, {}, betas=(1.0, 0.9))
    dora = made(face, {"default": CASES["dora"]})
    with pytest.raises(UnsupportedError, match="dora"):
        create_lorafa_optimizer(dora, 4, 8, 1e-3)
    model.base_model.set_requires_grad("default", False)
    with pytest.raises(ConfigError, match="no LoRA"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=2.0)
    with quiet():
        other = tiny.llama(num_hidden_layers=1)
    tt.attach(other, "ia3", "a")
    with pytest.raises(UnsupportedError, match="ia3"):
        create_lorafa_optimizer(other, 4, 8, 1e-3)


@pytest.mark.parametrize("name", ["plain", "patterns", "dora", "embedding", "head"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_steps_are_pefts(name: str, kind: Any) -> None:
    theirs, ours = both({"default": CASES[name]})
    theirs_made = peft.optimizers.create_riemannian_optimizer(theirs, kind, lr=1e-3, reg=0.1)
    made_here = create_riemannian_optimizer(ours, kind, lr=1e-3, reg=0.1)
    for _ in range(3):
        step(theirs, theirs_made)
        step(ours, made_here)
    compared(ours, theirs, 2e-5)
    with pytest.raises(UnsupportedError, match="closure"):
        made_here.step(lambda: 0.0)
    ours.base_model.set_requires_grad("default", False)
    with pytest.raises(ConfigError, match="both"):
        create_riemannian_optimizer(ours, kind, lr=1e-3)
