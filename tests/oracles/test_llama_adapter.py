"""LLaMA-Adapter against its formula, written out for one layer, and where PEFT's differs from the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaptionPromptConfig, TaskType
from torch import Tensor, nn

import trimtab as tt
from tests import tiny as models
from tests.oracles import kit
from tests.oracles.test_prompt_oracle import qwen
from trimtab.errors import UnsupportedError


def ids_of(*shape: int) -> Tensor:
    return torch.randint(3, models.VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_t5_is_the_formula_head_by_head() -> None:
    """Its scores have no scale; the gate of each head is a tanh."""
    model = kit.t5().double()
    adapter = tt.attach(
        model, tt.LlamaAdapter(length=3, targets="re:encoder.block.0.*SelfAttention"), "a"
    )
    kit.stir(adapter)
    named = {name.slot: tensor for name, tensor in adapter.named().items()}
    assert named["adaption_gate"].shape == (4,)
    attention = model.encoder.block[0].layer[0].SelfAttention
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with tt.using(model, None):
        base = attention(x)[0]
    prompt = named["adaption_prompt"][0].double()
    heads = []
    for head in range(4):
        rows = slice(head * 8, head * 8 + 8)
        q, k, v = (layer.weight[rows] for layer in (attention.q, attention.k, attention.v))
        shares = (x @ q.T @ (prompt @ k.T).T).softmax(-1)
        heads.append(named["adaption_gate"][head].double().tanh() * (shares @ (prompt @ v.T)))
    kit.assert_close(attention(x)[0], base + torch.cat(heads, -1) @ attention.o.weight.T, "output")


@pytest.mark.parametrize("make", [kit.llama, kit.gpt2, kit.bert, kit.t5, qwen, models.mixtral])
def test_scaling_moves_it_in_a_straight_line(make: kit.Make) -> None:
    """In one layer, before anything that is not linear: half the scale is half the way."""
    model = make().double()
    adapter = tt.attach(model, tt.LlamaAdapter(length=3, top=1), "a")
    kit.stir(adapter)
    module = model.get_submodule(adapter.sites[0].path)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    batch = kit.batch_of(model)
    with torch.no_grad():
        for factor in (0.0, 0.5, 1.0):
            tt.scale(model, "a", factor)
            kit.outputs(model, batch)
        tt.scale(model, "a", 1.0)
        with tt.using(model, None):
            kit.outputs(model, batch)
    handle.remove()
    zero, half, one, base = seen
    assert torch.equal(zero, base) and (one - base).abs().max() > 1e-4
    torch.testing.assert_close(half, (zero + one) / 2, atol=1e-6, rtol=1e-6)


def test_gpt2_differs_from_peft(tmp_path: Path) -> None:
    """PEFT adds the prompt's part after the output projection instead of before it; such a file is refused."""
    config = AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM, adapter_len=3, adapter_layers=1)
    theirs = kit.peft_model(kit.gpt2, config).double()
    model: nn.Module = kit.gpt2()
    adapter = tt.attach(model, tt.LlamaAdapter(length=3, top=1, gate="scalar"), "default")
    model.double()
    kit.stir(adapter)
    kit.give(kit.paired(adapter, theirs))
    batch = {"input_ids": ids_of(2, 6)}
    with torch.no_grad():
        assert (kit.outputs(model, batch) - kit.outputs(theirs, batch)).abs().max() > 1e-3
        projection = model.transformer.h[1].attn.c_proj
        projection.weight.copy_(torch.eye(32))
        projection.bias.zero_()
        other = theirs.base_model.model.transformer.h[1].attn.model.c_proj
        other.weight.copy_(torch.eye(32))
        other.bias.zero_()
        mine, their = kit.outputs(model, batch), kit.outputs(theirs, batch)
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)
    with kit.quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UnsupportedError, match="output projection"):
        tt.Adapter.load(tmp_path / "theirs")
    adapter.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())[
        "peft_type"
    ].startswith("TRIMTAB_")


def test_tensors_of_layers_stay_apart() -> None:
    """They lie beside the bank, by the paths of their attentions, and go when the adapter goes."""
    model = models.llama()
    names = set(model.state_dict())
    first = tt.attach(model, tt.LlamaAdapter(length=3, top=2), "a")
    tt.attach(model, tt.LlamaAdapter(length=5, top=3), "b")
    assert sorted(first.tensors) == [
        f"model.layers.{layer}.self_attn.adaption_{part}"
        for layer in (1, 2)
        for part in ("gate", "prompt")
    ]
    tt.detach(model, "b")
    with torch.no_grad():
        model(ids_of(1, 4))
    tt.detach(model, "a")
    assert set(model.state_dict()) == names
