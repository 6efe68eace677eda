"""AdapterDrop (Rücklé et al. 2020, arXiv 2010.11918): edits left out of the first blocks, in training and after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import shaken
from tests.laws.test_laws import recompute_blocks
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import ConfigError, TargetError, TrimtabError
from trimtab.optim.params import AdamParams

IDS = {"input_ids": torch.arange(3, 11)[None].repeat(2, 1)}
LAYERS = 3


def attached(text: str, seed: int = 1) -> tuple[nn.Module, tt.Adapter]:
    model = tiny.llama()
    return model, shaken(tt.attach(model, tt.method(text), "a"), seed=seed)


def touched(model: nn.Module) -> list[bool]:
    """Which blocks were given what needs a gradient."""
    found: list[bool] = []
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k: found.append(bool(a[0].requires_grad)), with_kwargs=True
        )
        for block in model.model.layers
    ]
    model(**IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "method", ["lora(rank=4{})", "bottleneck(size=4{})", "ia3({})", "lora(rank=4{})|bitfit({})"]
)
def test_dropped_at_inference_is_an_adapter_of_the_other_layers(method: str) -> None:
    model, adapter = attached(method.replace("({})", "").replace("{}", ""))
    whole = tiny.output(model, IDS)
    tt.drop_layers(model, "a", 2)
    found = tiny.output(model, IDS)
    assert not torch.equal(found, whole)
    with_layers = method.replace("({})", "(layers=[2])").replace("{}", ", layers=[2]")
    other, narrow = attached(with_layers)
    with torch.no_grad():
        for key, tensor in narrow.tensors.items():
            tensor.copy_(adapter.tensors[key])
    assert torch.equal(tiny.output(other, IDS), found)
    tt.drop_layers(model, "a", 0)
    assert torch.equal(tiny.output(model, IDS), whole)


def test_a_merge_leaves_them_out_too() -> None:
    model, _ = attached("lora(rank=4)")
    tt.drop_layers(model, "a", 2)
    expected = tiny.output(model, IDS)
    torch.testing.assert_close(tiny.output(tt.merge(model, "a"), IDS), expected)


def test_training_draws_how_many_and_evaluation_does_not() -> None:
    model, _ = attached("lora(rank=4, layer_drop=true)")
    plain, _ = attached("lora(rank=4)")
    assert torch.equal(tiny.output(model, IDS), tiny.output(plain, IDS))
    model.train()
    torch.manual_seed(0)
    seen = {sum(touched(model)) for _ in range(40)}
    # a block needs a gradient if a block before it was edited: with n left out, LAYERS − n − 1 blocks do
    assert seen == set(range(LAYERS))


def test_nothing_flows_below_the_first_block_that_is_edited() -> None:
    model, adapter = attached("lora(rank=4, layer_drop=true)")
    model.train()
    torch.manual_seed(0)
    for _ in range(10):
        adapter_gradients(model, adapter)
        live = {int(k.split(".")[2]) for k, t in adapter.tensors.items() if t.grad is not None}
        assert live == set(range(min(live), LAYERS))


def adapter_gradients(model: nn.Module, adapter: tt.Adapter) -> dict[str, Tensor | None]:
    for parameter in adapter.parameters():
        parameter.grad = None
    model(**IDS, use_cache=False).logits.square().sum().backward()
    return {key: tensor.grad for key, tensor in adapter.tensors.items()}


def test_a_recomputation_sees_the_same_draw() -> None:
    model, adapter = attached("lora(rank=4, layer_drop=true)")
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(model)
        torch.manual_seed(4)
        found.append([adapter_gradients(model, adapter) for _ in range(6)])
    for plain, checkpointed in zip(*found, strict=True):
        for key, gradient in plain.items():
            other = checkpointed[key]
            assert (gradient is None) == (other is None)
            if gradient is not None and other is not None:
                torch.testing.assert_close(gradient, other)


def test_a_run_resumes_bitwise(tmp_path: Path) -> None:
    data = [Datum.causal([3, 4, 5, 6], [0, 1, 1, 1]), Datum.causal([8, 9, 10], [0, 1, 1])]

    def go(engine: Engine, steps: int) -> None:
        for _ in range(steps):
            engine.forward_backward(data, "a")
            engine.optim_step("a", AdamParams(lr=0.01))

    model, straight = attached("lora(rank=4, layer_drop=true)")
    torch.manual_seed(7)
    go(Engine(model), 6)
    model, _ = attached("lora(rank=4, layer_drop=true)")
    engine = Engine(model)
    torch.manual_seed(7)
    go(engine, 3)
    engine.save("a", tmp_path / "state")
    torch.manual_seed(99)
    again = Engine(tiny.llama())
    again.load(tmp_path / "state")
    go(again, 3)
    for key, tensor in again._tenant("a").adapter.tensors.items():
        assert torch.equal(tensor, straight.tensors[key]), key


@torch.no_grad()
def test_a_prefix_is_left_out_of_the_first_blocks() -> None:
    """In training by the draw of each forward, and after it where it is told to."""
    model, adapter = attached("prefix(length=3, init_std=1.0, layer_drop=true)")
    only, other = attached("prefix(length=3, init_std=1.0, layers=[1, 2])")
    (table,), (later,) = adapter.parameters(), other.parameters()
    later.copy_(table[:, table.shape[1] // 3 :])
    ids = {"input_ids": torch.arange(3, 11)[None]}
    tt.drop_layers(model, "a", 1)
    assert torch.equal(tiny.output(model, ids), tiny.output(only, ids))
    tt.drop_layers(model, "a", 0)
    whole = tiny.output(model, ids)
    model.train()
    seen = {float(tiny.output(model, ids).sum()) for _ in range(20)}
    assert len(seen) == 3 and float(whole.sum()) in seen


def test_what_cannot_be_left_out_is_an_error() -> None:
    model, _ = attached("lora(rank=4)")
    with pytest.raises(ConfigError, match="0 to 3 blocks"):
        tt.drop_layers(model, "a", 4)
    with pytest.raises(TargetError, match="no blocks"):
        tt.attach(tiny.mixed(), tt.LoRA(targets="head", layer_drop=True))
    with pytest.raises(TrimtabError, match="before the text"):
        tt.attach(tiny.llama(), tt.Prompt(layer_drop=True))
    with pytest.raises(ConfigError, match="written in the parts"):
        tt.method("union(parts=[lora, bitfit], layer_drop=true)")
