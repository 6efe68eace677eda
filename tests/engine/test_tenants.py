"""Several adapters in one call: what concerns one of them concerns no other."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.engine import kit
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach
from trimtab.data import Datum
from trimtab.engine import Engine, passes
from trimtab.errors import NonFiniteLossError, TrainingError
from trimtab.optim import AdamParams
from trimtab.optim.params import Memory

STEP = AdamParams(lr=1e-2)
METHODS = {
    "a": "lora(rank=2)",
    "b": "lora(rank=3, targets='all-linear')",
    "c": "dora(rank=2)",
    "d": "ia3",
    "e": "bottleneck(size=4)",
    "f": "prefix(length=3)",
    "g": "spottune(inner='lora(rank=2)', blocks=1)",
    "h": "llama-adapter(length=3)",
    "i": "prompt(length=2)",
    "j": "gated(inner='prefix(length=3)')",
}
NAMES = list(METHODS)


def tenants(
    *, packed: bool = False, micro: int = 4096, dtype: torch.dtype = torch.float32
) -> tuple[Engine, dict[str, Adapter]]:
    """An engine with an adapter of each method, all of which do something."""
    base = kit.base(kit.llama(dtype=dtype))
    engine = Engine(base, packed=packed, micro_tokens=micro)
    adapters = {name: attach(base.model, method, name) for name, method in METHODS.items()}
    with torch.no_grad():
        for adapter in adapters.values():
            for number, parameter in enumerate(adapter.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return engine, adapters


def shared(count: int = 2) -> tuple[list[Datum], list[str]]:
    """So many data for each, which do not lie together."""
    data = kit.datums(count * len(NAMES))
    return data, NAMES * count


def gradients(adapter: Adapter) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in adapter.parameters()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return len(one) == len(other) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@cache
def healthy(packed: bool, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor | None]]:
    """The gradients of all, where nothing is wrong."""
    data, owners = shared()
    engine, adapters = tenants(packed=packed, dtype=dtype)
    assert all(micro.packed == packed for micro in engine.micro_batches(data, owners))
    torch.manual_seed(7)  # for gates that draw
    engine.forward_backward(data, owners)
    found = {name: gradients(adapter) for name, adapter in adapters.items()}
    assert all(any(g is not None and g.any() for g in own) for own in found.values())
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("victim", NAMES)
def test_a_loss_that_is_not_finite_is_its_tenant_s_alone(victim: str, packed: bool) -> None:
    data, owners = shared()
    before = healthy(packed)
    engine, adapters = tenants(packed=packed)
    with torch.no_grad():
        next(iter(adapters[victim].parameters())).fill_(math.nan)
    torch.manual_seed(7)
    result = engine.forward_backward(data, owners)
    assert list(result.errors) == [victim]
    first = data[owners.index(victim)].origin
    with pytest.raises(NonFiniteLossError, match=rf"{first}\b.* No tensor"):
        raise result.errors[victim]
    for name, adapter in adapters.items():
        found = gradients(adapter)
        if name == victim:
            assert all(gradient is None for gradient in found)
            with pytest.raises(TrainingError, match="no gradients"):
                engine.optim_step(name, STEP)
        else:
            assert same(found, before[name]), name
            assert engine.optim_step(name, STEP).step == 1


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_its_tenant_s_alone_in_bf16_too(packed: bool) -> None:
    """There products are taken in fp32 by pieces, in memory that is used again."""
    (data, owners), dtype = shared(), torch.bfloat16
    before = healthy(packed, dtype)
    engine, adapters = tenants(packed=packed, dtype=dtype)
    with torch.no_grad():
        for name in "bd":
            next(iter(adapters[name].parameters())).fill_(math.nan)
    torch.manual_seed(7)
    assert set(engine.forward_backward(data, owners).errors) == {"b", "d"}
    for name in set(NAMES) - {"b", "d"}:
        assert same(gradients(adapters[name]), before[name]), name


def test_the_sick_one_s_other_micro_batches_are_dropped_and_the_others_go_on() -> None:
    data, owners = kit.datums(8), ["a", "b"] * 4
    engine, adapters = tenants(micro=40)
    engine.forward_backward(data[::2], "a")
    assert len(list(engine.micro_batches(data, owners))) > 3
    poison = data[2].tokens[-1]
    unharmed = [i for i, d in enumerate(data) if poison not in d.tokens and owners[i] == "b"]
    assert len(unharmed) == 4
    alone, others = tenants(micro=40)
    alone.forward_backward([data[i] for i in unharmed], "b")
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[poison] = math.nan
    result = engine.forward_backward(data, owners)
    assert list(result.errors) == ["a"]
    assert data[2].origin in str(result.errors["a"])
    assert all(gradient is None for gradient in gradients(adapters["a"]))
    for one, other in zip(gradients(adapters["b"]), gradients(others["b"]), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert engine.optim_step("b", STEP).weight == sum(sum(data[i].weights) for i in unharmed)


@pytest.mark.parametrize("micro", [4096, 64])
def test_documents_of_several_adapters_share_rows_and_train_as_alone(micro: int) -> None:
    data, owners = shared(3)
    together, alone = tenants(packed=True, micro=micro), tenants(packed=False)
    for model in (together[0].model, alone[0].model):
        model.double()
    plan = list(together[0].micro_batches(data, owners))
    assert (len(plan) == 1) == (micro == 4096)
    assert sum(m.batch.input_ids.numel() for m in plan) == sum(map(len, data))  # no padding
    assert sorted(index for m in plan for index in m.members) == list(range(len(data)))
    assert max(len(set(m.owners)) for m in plan) > 2
    for m in plan:
        assert len(set(m.owners)) == 1 + sum(a != b for a, b in pairwise(m.owners))
    torch.manual_seed(3)
    together[0].forward_backward(data, owners)
    for name in NAMES:
        if name == "g":
            continue  # its gates draw
        mine = [datum for datum, owner in zip(data, owners, strict=True) if owner == name]
        alone[0].forward_backward(mine, name)
        found = zip(gradients(together[1][name]), gradients(alone[1][name]), strict=True)
        for one, other in found:
            assert one is not None and other is not None
            torch.testing.assert_close(one, other, rtol=1e-7, atol=2e-6)


def test_the_cheaper_layout_is_taken() -> None:
    engine, _ = tenants()
    engine.packed = None
    ragged = [datum for n in range(6) for datum in kit.datums(2, seed=n, longest=10 + 18 * n)]
    alike = [Datum.causal(range(20), [1.0] * 20) for _ in ragged]
    owners = ["a", "b"] * 6
    assert [m.packed for m in engine.micro_batches(ragged, owners)] == [True]
    assert [m.packed for m in engine.micro_batches(alike, owners)] == [False]
    engine._layout = replace(engine._layout, apart=False)
    assert not any(m.packed for m in engine.micro_batches(ragged, owners))


def test_where_attention_is_not_done_owner_by_owner_rows_are_not_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = tenants(packed=True)
    data = kit.datums(4)
    monkeypatch.setattr(passes, "BY_OWNER", ())
    for owners, shared_rows in (("abab", True), ("afaf", False), ("hbhb", False), ("ffff", True)):
        plan = engine.micro_batches(data, list(owners))
        assert all(micro.packed == shared_rows for micro in plan), owners


def test_held_out_losses_that_are_not_finite_are_told_apart_too() -> None:
    data, owners = kit.datums(3), ["a", None, "b"]
    engine, adapters = tenants()
    want = engine.forward(data, owners)
    with torch.no_grad():
        for parameter in adapters["a"].parameters():
            parameter.fill_(math.inf)
    found = engine.forward(data, owners)
    assert list(found.errors) == ["a"]
    assert list(found.sums[1:]) == list(want.sums[1:])
    with pytest.raises(NonFiniteLossError):
        engine.forward(data[:1], "a")


# -- random numbers ---------------------------------------------------------------------------------

DRAWING = {
    "a": "lora(rank=2, dropout=0.3)",
    "b": "lora(rank=3, dropout=0.3, targets='all-linear')",
    "c": "dora(rank=2, dropout=0.3)",
    "d": "loha(rank=2, rank_dropout=0.3, module_dropout=0.2)",
    "e": "boft(block=4, dropout=0.5)",
    "f": "prefix(length=3, dropout=0.3)",
    "g": "spottune(inner='lora(rank=2, dropout=0.2)', blocks=1)",
    "h": "loreft(rank=2, dropout=0.3)",
    "i": "adapterplus(reduction=16, drop=0.4)",
    "j": "monteclora(rank=2)",
    "k": "diff(prune_at=1.0)",
    "l": "lora(rank=2, layer_drop=true)",
}


def drawing(names: Sequence[str], model: PreTrainedModel | None = None) -> Engine:
    """An engine whose adapters draw random numbers in training."""
    base = kit.base(model)
    for name in names:
        adapter = attach(base.model, DRAWING[name], name)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    base.model.double()
    return Engine(base)


def alike(count: int) -> list[Datum]:
    """Data of one length, so that they are laid out alike whoever is beside them."""
    draw = random.Random(0)
    texts = [[draw.randrange(kit.VOCABULARY) for _ in range(12)] for _ in range(count)]
    return [Datum.causal(text, [0.0, 0.0, *[1.0] * 10]) for text in texts]


def trained(engine: Engine, data: list[Datum], owners: list[str], steps: int = 2) -> None:
    for _ in range(steps):
        engine.forward_backward(data, owners)
        for name in dict.fromkeys(owners):
            engine.optim_step(name, AdamParams(lr=1e-2, total=9))


def tensors(engine: Engine, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in engine._tenant(name).adapter.parameters()]


def test_adapters_that_draw_random_numbers_train_beside_others_as_alone() -> None:
    names = list(DRAWING)
    data, owners = alike(2 * len(names)), names * 2
    together = drawing(names)
    torch.manual_seed(5)
    trained(together, data, owners)
    for name in names:
        alone = drawing([name])
        torch.manual_seed(5)
        torch.rand(3)  # what else is drawn does not matter
        trained(alone, [d for d, o in zip(data, owners, strict=True) if o == name], [name] * 2)
        for one, other in zip(tensors(together, name), tensors(alone, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_drawn_follows_the_seed_and_leaves_the_process_s_numbers_alone(name: str) -> None:
    found = []
    for seed in (1, 1, 2, 3, 4):
        engine = drawing([name])
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trained(engine, alike(4), [name] * 4, 1)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(torch.cat([t.flatten() for t in tensors(engine, name)]))
    assert torch.equal(found[0], found[1])
    assert not all(torch.equal(found[0], other) for other in found[2:])


@pytest.mark.parametrize("what", ["mlp", "blocks"])
def test_a_recomputation_draws_the_same(what: Literal["mlp", "blocks"]) -> None:
    names = [name for name in DRAWING if name != "j"]  # it notes what it drew, in place
    data, owners = alike(2 * len(names)), names * 2
    found = []
    for memory in (Memory(), Memory(recompute=what)):
        engine = drawing(names)
        torch.manual_seed(3)
        engine.memory = memory
        engine.forward_backward(data, owners)
        found.append({name: gradients(engine._tenant(name).adapter) for name in names})
    for name in names:
        for one, other in zip(found[0][name], found[1][name], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_one_of_several_resumes_exactly(tmp_path: Path) -> None:
    names, data = ["a", "g", "l"], alike(6)
    owners = names * 2
    engine = drawing(names)
    torch.manual_seed(5)
    trained(engine, data, owners)
    engine.save("g", tmp_path / "g")
    trained(engine, data, owners)
    again = drawing(["a", "l"])
    torch.manual_seed(77)
    trained(again, data[:3], ["a", "l", "a"], 1)  # others are elsewhere
    again.load(tmp_path / "g")
    again.model.double()
    trained(again, data, owners)
    for one, other in zip(tensors(engine, "g"), tensors(again, "g"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_base_s_own_dropout_resumes_exactly(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=kit.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    assert config.resid_pdrop > 0
    engine = drawing(["a"], gpt2(config))
    trained(engine, alike(4), ["a"] * 4)
    engine.save("a", tmp_path / "a")
    trained(engine, alike(4), ["a"] * 4)
    torch.manual_seed(9)
    again = Engine(kit.base(gpt2(config)))
    again.load(tmp_path / "a")
    again.model.double()
    trained(again, alike(4), ["a"] * 4)
    for one, other in zip(tensors(engine, "a"), tensors(again, "a"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def gpt2(config: GPT2Config) -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def test_documents_that_end_where_a_prefix_would_hide_it() -> None:
    """Positions do not jump between them; attention is told where they end."""
    base = kit.base()
    for name, method in {"plain": "lora(rank=2)", "before": "prefix(length=4)"}.items():
        attach(base.model, method, name)
    data = [Datum.causal([7 + n] * 5, [1.0] * 5) for n in range(2)]
    owners = ["before", "plain"]
    together = Engine(base, packed=True).forward_backward(data, owners)
    alone = [Engine(base).forward([datum], name) for datum, name in zip(data, owners, strict=True)]
    assert together.sums == pytest.approx([found.sums[0] for found in alone], rel=1e-4)
    turned = Engine(base, packed=True).forward_backward(data, owners[::-1])
    assert sorted(turned.weights) == sorted(together.weights)
