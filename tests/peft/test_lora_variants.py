"""The variants of LoRA under PEFT's names: the same numbers in training, merged, and from either's state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import trimtab as tt
import trimtab.peft as face
from tests import tiny
from tests.peft.kit import IDS, both, fill, logits, made, quiet
from trimtab.errors import ConfigError, TargetError
from trimtab.peft import get_peft_model_state_dict, set_peft_model_state_dict
from trimtab.peft.helpers import MontecloraTrainerMixin

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "kasa": {"kasa_config": {"beta": 0.1, "gamma": 0.2}},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["q_"], "nblocks": 2}},
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": {"num_groups": 6}},
    "monteclora": {"monteclora_config": {"num_samples": 3, "buffer_size": 4}},
}  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
each = pytest.mark.parametrize("name", VARIANTS)


def pair(name: str) -> tuple[Any, Any]:
    """(PEFT's model, ours), of equal values."""
    base = tiny.gpt2 if name == "lora_bias" else lambda: tiny.llama(num_hidden_layers=2)
    with quiet("`lora_bias=True` was passed", ".*fan_in_fan_out"):
        theirs, ours = both({"default": {**PLAIN, **VARIANTS[name]}}, base=base)
    if name == "mica":  # B stays as it began, here as a buffer
        kept, others = dict(ours.named_buffers()), dict(theirs.named_parameters())
        with torch.no_grad():
            for key in [key for key in kept if ".lora_B." in key]:
                others[key].copy_(kept[key])
    return theirs, ours


@pytest.mark.parametrize("name", ["KasaConfig", "BdLoraConfig", "VeloraConfig", "MontecloraConfig"])
def test_the_parts_have_the_defaults_of_peft(name: str) -> None:
    ours, theirs = getattr(face, name)(), getattr(peft, name)()
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert isinstance(ours, type(theirs))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("KasaConfig", {"beta": -1.0}),
        ("BdLoraConfig", {"target_modules_bd_a": ["a"], "target_modules_bd_b": ["a"]}),
        ("BdLoraConfig", {"nblocks": 0}),
        ("VeloraConfig", {"num_groups": 0}),
        ("VeloraConfig", {"scale": 0.0}),
        ("VeloraConfig", {"init_type": "batch"}),
        ("MontecloraConfig", {"num_samples": 0}),
        ("MontecloraConfig", {"dirichlet_prior": 0.0}),
    ],
)
def test_values_that_do_not_fit(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=name):
        getattr(face, name)(**options)


@each
def test_as_many_parameters_are_trained_as_in_peft(name: str) -> None:
    theirs, ours = pair(name)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
    assert trained[0] == trained[1]
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@each
def test_outputs_merged_and_not_are_those_of_peft(name: str) -> None:
    theirs, ours = pair(name)
    expected = logits(theirs)
    torch.testing.assert_close(logits(ours), expected, **CLOSE)
    with quiet():
        torch.testing.assert_close(logits(theirs.merge_and_unload()), expected, **CLOSE)
    torch.testing.assert_close(logits(ours.merge_and_unload()), expected, **CLOSE)


@each
def test_a_state_dict_of_peft_s_is_read(name: str) -> None:
    theirs, ours = pair(name)
    fill(theirs, "default", size=0.2)
    with quiet("Adapter 'default': .* have invalid shape"):
        state = peft.get_peft_model_state_dict(theirs)
    set_peft_model_state_dict(ours, state)
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    again = get_peft_model_state_dict(ours)
    assert all(torch.equal(again[key], state[key]) for key in state)
    with quiet():
        peft.set_peft_model_state_dict(theirs, again)
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def own_loss(model: Any, name: str) -> Tensor | float:
    """What a script of PEFT's adds to the loss."""
    return model.base_model._get_kasa_loss() if name == "kasa" else 0.0


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "monteclora"])
def test_training_goes_as_in_peft(name: str) -> None:
    found = []
    for model in pair(name):
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(parameters, lr=0.02)
        losses = []
        for step in range(4):
            ids = IDS + step
            loss = model(input_ids=ids, labels=ids).loss + own_loss(model, name)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        found.append(torch.stack(losses))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    assert found[0][0] != found[0][-1]


def test_the_losses_that_peft_leaves_to_its_user_are_in_no_other() -> None:
    for name in ("kasa", "monteclora"):
        _, ours = pair(name)
        out = ours.train()(input_ids=IDS, labels=IDS)
        plain = ours.get_base_model().loss_function(out.logits, IDS, tiny.VOCABULARY)
        torch.testing.assert_close(out.loss, plain)
    loss = ours.base_model._get_monteclora_loss()
    assert isinstance(loss, Tensor) and loss.requires_grad and float(loss.detach()) != 0
    assert float(ours.base_model._get_monteclora_loss("default").detach()) == float(loss.detach())
    assert ours.base_model._get_kasa_loss() == 0.0
    ours.eval()(input_ids=IDS)
    assert ours.base_model._get_monteclora_loss() == 0.0


class Losses(MontecloraTrainerMixin, Trainer):
    """A trainer with MonteCLoRA's own loss."""


def test_a_trainer_adds_the_loss_of_monteclora(tmp_path: Any) -> None:
    _, ours = pair("monteclora")
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    batch = {"input_ids": IDS, "labels": IDS}
    torch.manual_seed(0)
    plain = Trainer(model=ours, args=arguments).compute_loss(ours.train(), dict(batch))
    own = ours.base_model._get_monteclora_loss()
    torch.manual_seed(0)
    whole = Losses(model=ours, args=arguments).compute_loss(ours.train(), dict(batch))
    torch.testing.assert_close(whole, plain + own)


def test_what_kasa_took_out_is_back_when_it_does_not_act() -> None:
    """In PEFT the base stays cut, and so no other adapter may stand beside it."""
    base = tiny.llama(num_hidden_layers=2)
    before = logits(base)
    model = made(face, {"default": {**PLAIN, **VARIANTS["kasa"]}, "other": PLAIN}, base=base)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    acting, other = logits(model), logits(model, "other")
    assert not torch.allclose(acting, other, **CLOSE)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", combination_type="cat")
    model.base_model.set_adapter(["default", "other"])
    model.set_adapter("sum")
    assert torch.isfinite(logits(model)).all()
    assert torch.equal(logits(model.unload()), before)


def test_layers_that_bdlora_does_not_name() -> None:
    options = {**PLAIN, "use_bdlora": {"target_modules_bd_a": ["down"], "nblocks": 2}}
    with pytest.raises(TargetError, match=r"'model.layers.0.self_attn.q_proj' is named by neither"):
        made(face, {"default": options})


def test_qalora_acts_where_peft_passes_over_it(tmp_path: Path) -> None:
    """On dense layers, PEFT's option makes a plain LoRA without a word."""
    options = {"default": {**PLAIN, "use_qalora": True, "qalora_group_size": 8}}
    theirs, ours = made(peft, options), made(face, options)
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert dict(theirs.named_parameters())[a].shape == (4, 32)
    assert dict(ours.named_parameters())[a].shape == (4, 4)
    expected = logits(ours)
    adapter = ours.base_model.adapters["default"]
    half = tt.add([adapter.detached(), adapter.detached()], name="default", weights=[0.5, 0.5])
    for number, shared in enumerate(
        (tt.exported(adapter), half)
    ):  # PEFT reads these, for they are LoRAs
        shared.save(tmp_path / str(number))
        with quiet():
            read = peft.PeftModel.from_pretrained(
                tiny.llama(num_hidden_layers=2), tmp_path / str(number)
            )
        torch.testing.assert_close(logits(read), expected, **CLOSE)
    ours.save_pretrained(tmp_path / "ours")
    with pytest.raises((ValueError, KeyError), match="TRIMTAB_QALORA"), quiet():
        peft.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path / "ours")
    again = face.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path / "ours")
    assert torch.equal(logits(again), expected)
    assert again.peft_config["default"].use_qalora
    torch.testing.assert_close(logits(ours.merge_and_unload()), expected, **CLOSE)


def test_a_variant_that_begins_elsewhere_is_shared_as_a_lora(tmp_path: Path) -> None:
    options = {**PLAIN, **VARIANTS["velora"], "init_lora_weights": "pissa"}
    ours = made(face, {"default": options})
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    again = face.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path / "ours")
    assert torch.equal(logits(again), expected)
    assert again.peft_config["default"].init_lora_weights == "pissa"
    with pytest.raises((ValueError, KeyError), match="TRIMTAB_VELORA"), quiet():
        peft.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path / "ours")
    tt.exported(ours.base_model.adapters["default"]).save(tmp_path / "shared")
    with quiet():
        read = peft.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path / "shared")
    torch.testing.assert_close(logits(read), expected, **CLOSE)


def module(model: nn.Module) -> nn.Module:
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


def test_the_parts_are_found_as_peft_has_them() -> None:
    theirs, ours = pair("kasa")
    assert module(ours).lora_diag["default"].shape == module(theirs).lora_diag["default"].shape
    _, ours = pair("velora")
    assert module(ours).lora_velora_embed["default"].shape == (6,)
