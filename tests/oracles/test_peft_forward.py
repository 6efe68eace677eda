"""Forward and backward against PEFT, for the methods that it has: the same values in, the same values out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, TaskType
from torch import nn

import trimtab as tt
from tests import tiny as models
from tests.oracles import kit
from tests.oracles.cases import CASES, ENCODED, Case
from tests.oracles.variants import VARIANTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", [*CASES, *ENCODED, *VARIANTS], ids=lambda case: case.name)
def test_outputs_and_gradients_equal_those_of_peft(case: Case, dtype: torch.dtype) -> None:
    if case.fp32_only and dtype == torch.float64:
        pytest.skip("PEFT computes it in float32")
    theirs = kit.peft_model(case.make, case.theirs).to(dtype)
    model = case.make()
    adapter = tt.attach(model, case.ours, "default")
    model.to(dtype)
    kit.stir(adapter)
    pairs = kit.paired(adapter, theirs)
    kit.give(pairs)
    batch = kit.batch_of(model)
    assert kit.acts(model, "default", batch)
    kit.assert_same_function(
        model, theirs, pairs, batch, torch.float32 if case.fp32 else dtype, case.other_gradients
    )


@pytest.mark.parametrize("name", ["all-linear", "conv1d", "classifier"])
def test_dropout_draws_the_same_masks_as_peft(name: str) -> None:
    """One mask per layer, on the input of the factors alone, in the order of the layers."""
    case = next(case for case in CASES if case.name == name)
    theirs = kit.peft_model(case.make, dataclasses.replace(case.theirs, lora_dropout=0.3)).double()
    model = case.make()
    adapter = tt.attach(model, case.ours.replace(dropout=0.3), "default")
    model.double()
    kit.stir(adapter)
    kit.give(kit.paired(adapter, theirs))
    batch = kit.batch_of(model)
    torch.manual_seed(5)
    ours = kit.outputs(model.train(), batch)
    torch.manual_seed(5)
    kit.assert_close(ours, kit.outputs(theirs.train(), batch), "outputs")
    assert (ours - kit.outputs(model.eval(), batch)).abs().max() > 1e-3


DROPOUTS = [
    ("hira", {"hira_dropout": 0.3}, {"dropout": 0.3}),
    ("hira-convolutions", {"hira_dropout": 0.3}, {"dropout": 0.3}),
    ("miss-mini", {"miss_dropout": 0.3}, {"dropout": 0.3}),
    ("randlora-sparse", {"randlora_dropout": 0.3}, {"dropout": 0.3}),
    ("boft", {"boft_dropout": 0.4}, {"dropout": 0.4}),
    ("boft-convolutions", {"boft_dropout": 0.4}, {"dropout": 0.4}),
    ("loha", {"rank_dropout": 0.3}, {"rank_dropout": 0.3}),
    ("loha-tucker-pictures", {"rank_dropout": 0.3}, {"rank_dropout": 0.3}),
    ("loha", {"module_dropout": 0.5}, {"module_dropout": 0.5}),
    ("lokr", {"rank_dropout": 0.3}, {"rank_dropout": 0.3}),
    ("lokr-convolutions-whole", {"rank_dropout": 0.3, "rank_dropout_scale": True},
     {"rank_dropout": 0.3, "rank_dropout_scale": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "theirs_too", "ours_too"), DROPOUTS, ids=lambda value: "-".join(value)
)
def test_dropouts_of_other_methods_draw_what_peft_draws(
    name: str, theirs_too: dict[str, Any], ours_too: dict[str, Any]
) -> None:
    case = next(case for case in CASES if case.name == name)
    theirs = kit.peft_model(case.make, dataclasses.replace(case.theirs, **theirs_too))
    model = case.make()
    adapter = tt.attach(model, case.ours.replace(**ours_too), "default")
    kit.stir(adapter)
    kit.give(kit.paired(adapter, theirs))
    batch = kit.batch_of(model)
    drawn = []
    for each in (model, theirs):
        torch.manual_seed(5)
        drawn.append(kit.outputs(each.train(), batch))
    kit.assert_close(drawn[0], drawn[1], "outputs")
    assert (drawn[0] - kit.outputs(model.eval(), batch)).abs().max() > 1e-5
    kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs.eval(), batch), "evaluated")


@pytest.mark.parametrize("name", ["oft-constrained", "oft-constrained-shared", "oft-bias-all"])
def test_constrained_oft_is_trained_as_in_peft(name: str) -> None:
    """PEFT pulls rotations back when they are used next, we after each step (and wherever they are used)."""
    case = next(case for case in CASES if case.name == name)
    theirs = kit.peft_model(case.make, case.theirs)
    model = case.make()
    adapter = tt.attach(model, case.ours, "default")
    steps, batch = tt.Stepper(adapter), kit.batch_of(model)
    sides = [
        (model, list(adapter.parameters())),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ]
    optimisers = [torch.optim.SGD(parameters, lr=3.0) for _, parameters in sides]
    for _ in range(4):
        found = []
        for (side, _), optimiser in zip(sides, optimisers, strict=True):
            optimiser.zero_grad()
            found.append(kit.objective(kit.outputs(side, batch)))
            found[-1].backward()
            optimiser.step()
        kit.assert_close(found[0].detach(), found[1].detach(), "loss")
        before = [p.detach().clone() for p in sides[0][1]]
        steps.after()
    assert any(not torch.equal(a, b) for a, b in zip(before, sides[0][1], strict=True))
    kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), "trained")


def test_experts_equal_those_of_peft() -> None:
    """Same mathematics, other storage: PEFT flattens (expert, rank) into one axis, we keep (E, rank, …)."""
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]
    )
    with kit.quiet():
        theirs = kit.peft_model(models.mixtral, config).double()
    model = models.mixtral()
    adapter = tt.attach(model, tt.LoRA(rank=2, alpha=6, targets="**.experts.*_proj"), "default")
    model.double()
    kit.stir(adapter)
    parameters = dict(theirs.named_parameters())
    ours = adapter.tensors
    pairs: kit.Pairs = {}
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        for parameter, nested in (("gate_up_proj", "base_layer."), ("down_proj", "")):
            a = parameters[f"base_model.model.{at}.{nested}lora_A.default.weight"]
            b = parameters[f"base_model.model.{at}.{nested}lora_B.default.weight"]
            a_ERI = ours[f"{at}.{parameter}.lora_A.weight"]
            b_EOR = ours[f"{at}.{parameter}.lora_B.weight"]
            with torch.no_grad():
                a.copy_(a_ERI.flatten(0, 1))
                b.copy_(b_EOR.permute(1, 2, 0).flatten(1))
            pairs[f"{at}.{parameter}.A"] = a_ERI, a
            pairs[f"{at}.{parameter}.B"] = b_EOR, b
    batch = kit.batch_of(model)
    left, right = kit.outputs(model, batch), kit.outputs(theirs, batch)
    kit.assert_close(left, right, "outputs")
    kit.objective(left).backward()
    kit.objective(right).backward()
    for key, (mine, other) in pairs.items():
        flat = (
            mine.grad.flatten(0, 1) if key.endswith("A") else mine.grad.permute(1, 2, 0).flatten(1)
        )
        kit.assert_close(flat, other.grad, key)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.other_gradients], ids=lambda case: case.name
)
def test_where_gradients_are_not_peft_s_ours_are_those_of_its_outputs(case: Case) -> None:
    """The backward of PEFT's LoHa with cores takes the other matrix's factors for two of the gradients."""
    theirs = kit.peft_model(case.make, case.theirs).double()
    model = case.make()
    adapter = tt.attach(model, case.ours, "default")
    model.double()
    kit.stir(adapter)
    pairs = kit.paired(adapter, theirs)
    kit.give(pairs)
    batch = kit.batch_of(model)
    kit.objective(kit.outputs(model, batch)).backward()
    kit.objective(kit.outputs(theirs, batch)).backward()
    generator = torch.Generator().manual_seed(4)
    for key, (mine, other) in pairs.items():
        if not key.endswith(case.other_gradients) or "square" not in key:
            continue
        direction = torch.randn(other.shape, generator=generator).double()
        with torch.no_grad():
            found = []
            for size in (1e-4, -2e-4):
                other.add_(direction * size)
                found.append(kit.objective(kit.outputs(theirs, batch)))
            other.add_(direction * 1e-4)
        slope = float(found[0] - found[1]) / 2e-4
        assert float((mine.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)
        assert float((other.grad * direction).sum()) != pytest.approx(slope, rel=1e-2)


# -- differences by intent ----------------------------------------------------------------------------


def test_dora_with_dropout_differs() -> None:
    """PEFT drops the input of the frozen path too, where m ≠ ‖W‖; ours drops that of the factors alone."""
    config = LoraConfig(target_modules=["q_proj"], r=2, use_dora=True, lora_dropout=0.5)
    theirs = kit.peft_model(kit.llama, config)
    model = kit.llama()
    adapter = tt.attach(model, tt.DoRA(rank=2, alpha=8, targets="q_proj", dropout=0.5), "default")
    with torch.no_grad():
        for key, tensor in adapter.tensors.items():
            tensor.mul_(2.0 if "magnitude" in key else 0.0)
    kit.give(kit.paired(adapter, theirs))
    batch = kit.batch_of(model)
    with torch.no_grad():
        ours, calm = kit.outputs(model.train(), batch), kit.outputs(model.eval(), batch)
        assert torch.equal(ours, calm)
        kit.assert_close(calm, kit.outputs(theirs, batch), "without dropout")
        assert (kit.outputs(theirs.train(), batch) - calm).abs().max() > 1e-3


IDLE = [
    ("oft", {"module_dropout": 0.6}),
    ("miss-bat", {"miss_dropout": 0.6}),
]


@pytest.mark.parametrize(("name", "option"), IDLE, ids=lambda value: "-".join(value))
def test_dropouts_that_peft_forgets(name: str, option: dict[str, Any]) -> None:
    """It takes the option and never drops anything; ours does what the option says."""
    case = next(case for case in CASES if case.name == name)
    theirs = kit.peft_model(case.make, dataclasses.replace(case.theirs, **option))
    model = case.make()
    adapter = tt.attach(model, case.ours.replace(dropout=0.6), "default")
    kit.stir(adapter)
    kit.give(kit.paired(adapter, theirs))
    batch = kit.batch_of(model)
    calm = kit.outputs(model, batch)
    kit.assert_close(calm, kit.outputs(theirs, batch), "evaluated")
    assert torch.equal(kit.outputs(theirs.train(), batch), kit.outputs(theirs.eval(), batch))
    assert (kit.outputs(model.train(), batch) - calm).abs().max() > 1e-3


def test_ia3_defaults_differ() -> None:
    """The paper rescales keys, values and the MLP's inner activations; PEFT's defaults stray from it."""
    theirs, ours = _ia3_sizes(kit.gpt2, IA3Config(fan_in_fan_out=True))
    assert theirs["c_attn"] == 3 * 32 and ours["c_attn"] == 2 * 32  # PEFT's: queries as well
    theirs, ours = _ia3_sizes(kit.bert, IA3Config())
    assert theirs["attention.output.dense"] == 32  # "output.dense" ends this name, too
    assert "attention.output.dense" not in ours
    theirs, ours = _ia3_sizes(kit.llama, IA3Config())
    assert theirs == ours


def _ia3_sizes(
    make: Callable[[], nn.Module], config: IA3Config
) -> tuple[dict[str, int], dict[str, int]]:
    """Values per kind of module that PEFT's defaults and ours train."""
    theirs = kit.peft_model(make, config)
    with_scale = {
        name.partition(".ia3_l")[0]: p.numel()
        for name, p in theirs.named_parameters()
        if "ia3_l" in name
    }
    adapter = tt.attach(make(), tt.IA3(), "default")
    own = {key.removesuffix(".ia3_l"): t.numel() for key, t in adapter.tensors.items()}
    kinds = (
        "attention.output.dense",
        "c_attn",
        "c_proj",
        "k_proj",
        "v_proj",
        "down_proj",
        "key",
        "value",
    )

    def by_kind(sizes: dict[str, int]) -> dict[str, int]:
        return {kind: size for kind in kinds for path, size in sizes.items() if path.endswith(kind)}

    return by_kind(with_scale), by_kind(own)


def test_grouped_and_dilated_convolutions_differ() -> None:
    """Ours stay grouped and dilated, so that they merge; PEFT's A sees all channels, and no dilation."""
    plain = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, dilation=2))
    with kit.quiet("LoRA adapter added to ConvNd layer with groups"):
        theirs = kit.peft_model(lambda: copy.deepcopy(plain), LoraConfig(target_modules=["0"], r=2))
    model = copy.deepcopy(plain)
    adapter = tt.attach(model, tt.LoRA(rank=2, targets="0"), "default")
    assert adapter.tensors["0.lora_A.weight"].shape == (2, 2, 3)
    assert dict(theirs.named_parameters())["base_model.model.0.lora_A.default.weight"].shape == (
        2,
        4,
        3,
    )
    x = torch.randn(2, 4, 9)
    with pytest.raises(RuntimeError, match="size"):
        theirs(x)
    kit.stir(adapter)
    with torch.no_grad():
        kit.assert_close(model(x), tt.merge(model, "default")(x), "merged")


def test_prefix_of_an_encoder_decoder_differs() -> None:
    """Ours: self-attention of both stacks. PEFT's: self- and cross-attention of the decoder, one table for both."""
    config = PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3)
    theirs = kit.peft_model(kit.t5, config)
    model = kit.t5()
    adapter = tt.attach(model, tt.Prefix(length=3), "default")
    table = dict(theirs.named_parameters())["prompt_encoder.default.embedding.weight"]
    assert table.shape == (3, 2 * 2 * 32)  # 2 layers
    assert adapter.tensors["prompt_encoder.embedding.weight"].shape == (3, 4 * 2 * 32)  # 2 + 2
    assert [site.path for site in adapter.sites] == [
        f"{stack}.block.{block}.layer.0.SelfAttention"
        for stack in ("encoder", "decoder")
        for block in range(2)
    ]
