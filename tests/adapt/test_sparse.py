"""Sparse deltas: which weights are chosen, and that no other one ever moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.adapt.test_observe import batch
from trimtab.adapt.sparse import largest_places, random_places, shared_out
from trimtab.errors import AttachError, ConfigError, UnsupportedError


def places(adapter: tt.Adapter, path: str) -> set[tuple[int, int]]:
    rows, columns = adapter.tensors[f"{path}.shira_indices"].tolist()
    return set(zip(rows, columns, strict=True))


def test_magnitude_takes_the_largest_weights() -> None:
    model = tiny.llama()
    adapter = tt.attach(model, tt.method("magnitude(rank=2)"), "a")
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        weight = model.get_submodule(path).base_layer.weight.detach().abs()
        count = 2 * sum(weight.shape)
        chosen = places(adapter, path)
        assert len(chosen) == count
        least = min(float(weight[place]) for place in chosen)
        assert int((weight > least).sum()) < count


@pytest.mark.parametrize("data", ["random", "fisher"])
def test_only_chosen_weights_move_whatever_the_decay(data: str) -> None:
    """Gradient masks under AdamW let weight decay and momentum move the rest (methods that zero gradients do)."""
    model = tiny.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = tt.SHiRA(rank=1, mask=data)
    adapter = tt.attach(model, method, "a", batches=[batch()])
    optimiser = torch.optim.AdamW(tt.parameter_groups(adapter, lr=0.05, weight_decay=0.5))
    size = sum(p.numel() for group in optimiser.param_groups for p in group["params"])
    assert size == adapter.count  # and so is the optimiser's state
    for _ in range(4):
        optimiser.zero_grad()
        model(**batch()).loss.backward()
        optimiser.step()
    merged = tt.merge(model, "a").state_dict()
    moved = 0
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        same = merged[name] == tensor
        if f"{path}.shira_indices" in adapter.tensors:
            chosen = torch.zeros_like(same)
            chosen[tuple(adapter.tensors[f"{path}.shira_indices"].long())] = True
            same, moved = same[~chosen], moved + int((~same[chosen]).sum())
        assert bool(same.all()), name
    assert moved > 0.9 * adapter.count


def test_the_trap_that_this_avoids() -> None:
    """What a mask on gradients alone does, in the words of torch: the decay moves what was never chosen."""
    weight = nn.Parameter(torch.ones(4))
    optimiser = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.tensor([1.0, 0.0, 0.0, 0.0])
    optimiser.step()
    assert bool((weight[1:] != 1).all())


def test_fisher_is_the_mean_of_squares_over_examples_and_chosen_over_all_targets() -> None:
    data = batch(rows=4)
    targets = ("q_proj", "down_proj")
    adapter = tt.attach(
        tiny.llama(), tt.SHiRA(mask="fisher", share=0.02, targets=targets), "a", batches=[data]
    )
    model = tiny.llama()
    weights = {
        name.removesuffix(".weight"): p
        for name, p in model.named_parameters()
        if name.removesuffix(".weight").endswith(targets)
    }
    fisher = {path: torch.zeros_like(p) for path, p in weights.items()}
    for row in range(4):
        loss = model(**{k: v[row : row + 1] for k, v in data.items()}).loss
        for path, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            fisher[path] += g.square() / 4
    budget = sum(round(0.02 * p.numel()) for p in weights.values())
    least = torch.cat([f.flatten() for f in fisher.values()]).topk(budget).values.min()
    for path, f in fisher.items():
        wanted = set(map(tuple, (f >= least).nonzero().tolist()))
        assert places(adapter, path) >= wanted
        assert len(places(adapter, path)) == max(1, len(wanted))


def test_fish_without_data_says_what_to_pass() -> None:
    with pytest.raises(AttachError, match="pass batches"):
        tt.attach(tiny.llama(), tt.method("fish"), "a")


def test_a_sum_of_different_places_is_exact(tmp_path: object) -> None:
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    for one, two in (("random", "magnitude"), ("random", "random")):
        model = tiny.llama().double()
        base = tiny.output(model, inputs)
        parts = [
            tt.attach(model, tt.SHiRA(rank=2, mask=mask, targets="down_proj", layers=(2,)), name, seed=seed)
            for seed, (name, mask) in enumerate((("a", one), ("b", two)))
        ]  # fmt: skip
        with torch.no_grad():
            for part in parts:
                for p in part.parameters():
                    p.add_(torch.randn_like(p))
            with tt.using(model, ["a", "b"]):
                both = tiny.output(model, inputs)
        summed = tt.add(parts, name="s")
        assert summed.method.rank == 4 and summed.count == sum(part.count for part in parts)
        fresh = tiny.llama().double()
        tt.attach(fresh, summed)
        assert (tiny.output(fresh, inputs) - both).abs().max() < 1e-9
        assert (both - base).abs().max() > 1e-3


def test_sums_over_different_targets_and_experts() -> None:
    case = tiny.CASES["mixtral"]
    model, inputs = case.model(), case.inputs()
    first = tt.attach(model, tt.SHiRA(rank=1), "a")
    second = tt.attach(model, tt.SHiRA(rank=2, targets="**.experts.*_proj"), "b", seed=1)
    with torch.no_grad():
        for p in (*first.parameters(), *second.parameters()):
            p.add_(torch.randn_like(p) * 0.1)
        with tt.using(model, ["a", "b"]):
            both = tiny.output(model, inputs)
        fresh = case.model()
        tt.attach(fresh, tt.add([first, second], name="s"))
        assert (tiny.output(fresh, inputs) - both).abs().max() < 1e-9


def test_a_norm_has_no_matrix_and_a_small_weight_not_so_many_values() -> None:
    with pytest.raises(UnsupportedError, match="vector"):
        tt.attach(tiny.llama(), tt.SHiRA(targets="norms"), "a")
    with pytest.raises(ConfigError, match="choose a smaller rank"):
        tt.attach(tiny.llama(), tt.SHiRA(rank=32), "a")


def test_an_embedding_builds_only_the_rows_of_its_tokens() -> None:
    layer = nn.Embedding(1000, 4, padding_idx=0)
    model = nn.Sequential(layer)
    adapter = tt.attach(model, tt.SHiRA(share=0.5, targets="0"), "a")
    values = next(adapter.parameters())
    with torch.no_grad():
        values.normal_()
    ids = torch.tensor([[5, 0, 5], [7, 999, 5]])
    columns = adapter.tensors["0.shira_indices"][1]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(_noting(saved), lambda t: t):
        out = model(ids)
    expected = tt.merge(model, "a")(ids)
    assert torch.equal(out.detach(), expected.detach())
    assert max(saved) <= 2000  # the values and their places; the dense table has 4000
    out.sum().backward()
    assert values.grad is not None
    learnt = set(columns[values.grad != 0].tolist())
    assert learnt and learnt <= {5, 7, 999}  # padding learns nothing, as in the frozen table
    counts = {int(c): float(g) for c, g in zip(columns, values.grad, strict=True) if g}
    assert counts.get(5, 3.0) == 3.0 and counts.get(7, 1.0) == 1.0


def _noting(sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    return note


def test_choosing() -> None:
    generator = torch.Generator().manual_seed(0)
    found = random_places((3, 4), 5, generator)
    flat = (found[0] * 4 + found[1]).tolist()
    assert found.dtype == torch.int32 and flat == sorted(set(flat)) and len(flat) == 5
    scores = torch.tensor([[1.0, 9.0], [8.0, 2.0]])
    assert largest_places(scores, 2).tolist() == [[0, 1], [1, 0]]
    counts = shared_out(
        {"a": [scores], "b": [torch.tensor([[7.0, 0.5]])], "c": [torch.zeros(1, 2)]}, 3
    )
    assert counts == {"a": 2, "b": 1, "c": 1}
