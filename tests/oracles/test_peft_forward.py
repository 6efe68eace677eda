"""Forward and backward against PEFT, for the methods that it has: the same values in, the same values out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

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
    kit.assert_same_function(model, theirs, pairs, batch, torch.float32 if case.fp32 else dtype)


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
