"""The laws, over every registered method and every tiny model (fp64, so that equal means equal)."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from tests.laws.cells import (
    NOT_MERGEABLE,
    REFUSED,
    Cell,
    attached,
    law,
    registered,
    shaken,
)
from tests.tiny import CASES, output, pick
from trimtab.adapt.bank import bank_of
from trimtab.adapt.merge import merge_in_place, pushed, unmerge
from trimtab.adapt.probe import bare_state
from trimtab.adapt.replaced import Replaced
from trimtab.adapt.site import Site
from trimtab.adapt.tree import sites_of
from trimtab.engine.saving import recomputed
from trimtab.errors import NotMergeableError, TrimtabError

TOLERANCE = 1e-9


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((a - b).abs().max() <= tolerance)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bare_state(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A smooth loss over every output; a causal gate is told where the prompt ends."""
    out = output(model, inputs)
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).tanh().sum()


def with_prompt(cell: Cell, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels that mark the first half as the prompt, for causal models in training."""
    if not CASES[cell.model].decodes:
        return inputs
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    return {**inputs, "labels": labels}


def gradients(adapter: tt.Adapter) -> dict[str, Tensor | None]:
    return {name: None if t.grad is None else t.grad.clone() for name, t in adapter.tensors.items()}


@law
def test_the_edit_does_something(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(), case.inputs()
    base = output(model, inputs)
    attached(cell, model)
    assert not close(output(model, inputs), base, 1e-6)


@law
def test_identity_at_first(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(), case.inputs()
    base = output(model, inputs)
    tt.attach(model, cell.value(), "a")
    # masters are fp32 and the base is fp64: a copied weight or norm differs in the last fp32 bits
    assert close(output(model, inputs), base, 1e-6)


@law
@torch.no_grad()  # with gradients, torch may choose another attention kernel for trained than for frozen weights
def test_disabled_is_the_base_bitwise(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(torch.float32), case.inputs()
    base = output(model, inputs)
    attached(cell, model)
    with tt.using(model, None):
        assert torch.equal(output(model, inputs), base)
    tt.disable(model, "a")
    assert torch.equal(output(model, inputs), base)
    tt.enable(model, "a")
    assert not torch.equal(output(model, inputs), base)
    if all(part.layerwise or part.kind == "llama-adapter" for part in cell.value().members):
        tt.scale(model, "a", 0.0)
        assert close(output(model, inputs), base, 1e-5)


@law
def test_merge_is_forward(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(), case.inputs()
    attached(cell, model)
    before = state(model)
    if cell.method in NOT_MERGEABLE:
        with pytest.raises(NotMergeableError, match=NOT_MERGEABLE[cell.method]):
            tt.merge(model, "a")
        return
    expected = output(model, inputs)
    merged = tt.merge(model, "a")
    assert close(output(merged, inputs), expected, 1e-5)
    assert not any(isinstance(module, Site) for module in merged.modules())
    assert same(state(model), before)
    assert torch.equal(output(model, inputs), expected)


@law
def test_merged_in_place_nothing_changes_for_anyone(cell: Cell) -> None:
    """The frozen weights are kept beside the merged ones: rows of others read them, and unmerging leaves no trace."""
    case = CASES[cell.model]
    model, inputs = case.model(), case.inputs()
    attached(cell, model)
    before = state(model)
    if cell.method in NOT_MERGEABLE:
        with pytest.raises(NotMergeableError, match=NOT_MERGEABLE[cell.method]):
            merge_in_place(model, "a")
        assert same(state(model), before)
        return
    expected = output(model, inputs)
    with tt.using(model, None):
        base = output(model, inputs)
    with tt.rows(model, ["a", None, "a", None]):
        mixed = output(model, inputs)
    merge_in_place(model, "a")
    assert close(output(model, inputs), expected, 1e-5)
    with tt.using(model, None):
        assert torch.equal(output(model, inputs), base)
    with tt.rows(model, ["a", None, "a", None]):
        assert close(output(model, inputs), mixed, 1e-5)
    unmerge(model)
    assert torch.equal(output(model, inputs), expected)
    merge_in_place(model, "a")
    tt.detach(model, "a")
    assert same(state(model), before)


@law
def test_closed_form_merge_is_the_identity_push(cell: Cell) -> None:
    from trimtab.adapt.merge import merged_weights
    from trimtab.frozen import view

    model = CASES[cell.model].model(torch.float32)
    attached(cell, model)
    with torch.no_grad():
        for site in sites_of(model).values():
            if not isinstance(site, Site):
                continue
            edits = site.acting(("a",))
            replaced = any(isinstance(edit.method, Replaced) for edit in edits)
            if replaced and site.layer.kind == "norm":
                continue  # a norm that is replaced whole has no identity to push
            weight, bias = merged_weights(site, ("a",), site.layer, edits, site)
            dense = view(site.layer.write(site.layer.dense().float(), site.layer.bias()))
            assert dense is not None
            other_weight, other_bias = pushed(site, ("a",), dense, edits, site)
            assert close(weight, other_weight, 1e-5)
            assert close(
                torch.zeros(1) if bias is None else bias,
                torch.zeros(1) if other_bias is None else other_bias,
                1e-5,
            )


@law
def test_a_row_in_a_mixed_batch_is_the_row_alone(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(), case.inputs()
    attached(cell, model, "a")
    attached(cell, model, "b", seed=2)
    names = ["a", None, "b", "a"]
    with tt.rows(model, names):
        together = output(model, inputs)
    for row, name in enumerate(names):
        with tt.using(model, name):
            assert close(together[row], output(model, pick(inputs, [row]))[0]), (
                f"row {row} ({name})"
            )


@law
def test_every_method_shares_a_batch_with_this_one(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(), case.inputs()
    names = [m for m in registered() if (m, cell.model) not in REFUSED]
    rows = [names[(names.index(cell.method) + k) % len(names)] for k in (0, 1, 2)] + [cell.method]
    for number, name in enumerate(dict.fromkeys(rows)):
        attached(Cell(name, cell.model), model, name, seed=number)
    with tt.rows(model, rows):
        together = output(model, inputs)
    for row, name in enumerate(rows):
        with tt.using(model, name):
            assert close(together[row], output(model, pick(inputs, [row]))[0]), (
                f"row {row} ({name})"
            )


@law
def test_trained_together_is_trained_alone(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(), with_prompt(cell, case.inputs())
    a = attached(cell, model, "a")
    b = attached(cell, model, "b", seed=2)
    rows = ["a", "b", None, "a"]
    with tt.rows(model, rows):
        loss_rows(model, inputs).sum().backward()
    together = gradients(a), gradients(b)
    for number, adapter in enumerate((a, b)):
        for parameter in adapter.parameters():
            parameter.grad = None
        mine = [row for row, name in enumerate(rows) if name == adapter.name]
        with tt.using(model, adapter.name):
            loss_rows(model, pick(inputs, mine)).sum().backward()
        alone = gradients(adapter)
        for key, gradient in alone.items():
            other = together[number][key]
            assert (gradient is None) == (other is None), key
            if gradient is not None and other is not None:
                assert close(gradient, other, 1e-6), key
        other_adapter = b if adapter is a else a
        if number == 0:
            assert all(
                g is None or torch.equal(g, together[1][k])
                for k, g in gradients(other_adapter).items()
            )


@law
def test_trained_beside_other_methods_is_trained_alone(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(), with_prompt(cell, case.inputs())
    names = [m for m in registered() if (m, cell.model) not in REFUSED]
    place = names.index(cell.method)
    rows = [names[(place + k) % len(names)] for k in (0, 1, 2)] + [cell.method]
    for number, name in enumerate(dict.fromkeys(rows)):
        attached(Cell(name, cell.model), model, name, seed=number)
    found = []
    for route in ("mixed", "alone"):
        for parameter in model.parameters():
            parameter.grad = None
        mine = list(range(4)) if route == "mixed" else [0, 3]
        scope = tt.rows(model, rows) if route == "mixed" else tt.using(model, cell.method)
        with scope:
            loss_rows(model, pick(inputs, mine)).sum().backward()
        found.append(gradients(bank_of(model).adapters[cell.method]))
    for key, alone in found[1].items():
        mixed = found[0][key]
        assert (mixed is None) == (alone is None), key
        if mixed is not None and alone is not None:
            assert close(mixed, alone, 1e-6), key


def loss_rows(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """One loss per row."""
    out = output(model, inputs).flatten(1)
    return (out * torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)).tanh().sum(1)


@law
def test_exactly_the_declared_parameters_learn_and_the_base_stays(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(torch.float32), with_prompt(cell, case.inputs())
    before = state(model)
    adapter = tt.attach(model, cell.value(), "a")
    shaken(adapter, 0.05)
    model.train()
    trained = list(adapter.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    seen: set[str] = set()
    torch.manual_seed(0)
    for _ in range(3):
        optimiser.zero_grad()
        loss = loss_of(model, inputs)
        auxiliary = [value for _, _, value in bank_of(model).take_losses()]
        (loss + sum(auxiliary)).backward()
        seen |= {
            key
            for key, g in gradients(adapter).items()
            if g is not None and bool(g.abs().sum() > 0)
        }
        optimiser.step()
    fixed = {name.key for name in adapter.fixed}
    assert not seen & fixed
    silent = {key for key in adapter.tensors if key not in seen | fixed}
    # no expert is sure to be chosen by eight tokens, and a key bias has no effect on a softmax
    assert {
        key
        for key in silent
        if "experts" not in key and ".key." not in key and ".k_proj." not in key
    } == set()
    assert all(
        p.grad is None for n, p in model.named_parameters() if id(p) not in {id(t) for t in trained}
    )
    assert same(state(model), before)


@law
def test_save_and_load_is_the_identity(cell: Cell, tmp_path) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(torch.float32), case.inputs()
    adapter = attached(cell, model)
    expected = output(model, inputs)
    adapter.save(tmp_path / "a")
    loaded = tt.Adapter.load(tmp_path / "a")
    assert loaded == adapter
    fresh = case.model(torch.float32)
    tt.attach(fresh, loaded)
    assert torch.equal(output(fresh, inputs), expected)
    assert set(fresh.state_dict()) == set(model.state_dict())
    assert bank_of(fresh).adapters["a"].method == cell.value()


@law
def test_detach_leaves_no_trace(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(torch.float32), case.inputs()
    names = [name for name, _ in model.named_modules()]
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    parameter = next(model.parameters())
    parameter.requires_grad_(False)
    expected = output(model, inputs)
    adapter = attached(cell, model)
    attached(cell, model, "b")
    values = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    tt.detach(model, "b")
    back = tt.detach(model, "a")
    assert back is adapter and not adapter.attached
    assert all(torch.equal(values[key], tensor) for key, tensor in back.tensors.items())
    assert [name for name, _ in model.named_modules()] == names
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert not parameter.requires_grad and sum(p.requires_grad for p in model.parameters()) > 0
    assert torch.equal(output(model, inputs), expected)


@law
def test_state_dict_keeps_the_names_of_the_base(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(torch.float32), case.inputs()
    before = model.state_dict()
    adapter = attached(cell, model)
    expected = output(model, inputs)
    now = model.state_dict()
    assert [key for key in now if key in before] == list(before)
    assert len(now) == len(before) + len(adapter.tensors)
    fresh = case.model(torch.float32)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    tt.attach(fresh, cell.value(), "a")
    fresh.load_state_dict(now, strict=True)
    assert torch.equal(output(fresh, inputs), expected)
    fresh.load_state_dict(before, strict=True)  # of the bare base: the adapter keeps its values
    assert torch.equal(output(fresh, inputs), expected)


@law
def test_copies_are_independent(cell: Cell) -> None:
    case = CASES[cell.model]
    model, inputs = case.model(torch.float32), case.inputs()
    attached(cell, model)
    expected = output(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, inputs), expected)
    tt.disable(twin, "a")
    with torch.no_grad():
        for parameter in bank_of(twin).adapters["a"].parameters():
            parameter.zero_()
    assert torch.equal(output(model, inputs), expected)
    tt.detach(twin, "a")
    assert torch.equal(output(model, inputs), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False), inputs), expected)


@law
def test_checkpointed_gradients_are_plain_gradients(cell: Cell) -> None:
    """With the backward after the ``with``, when another adapter is active: the recomputation recalls."""
    case = CASES[cell.model]
    found = []
    for recompute in (False, True):
        model, inputs = case.model(), with_prompt(cell, case.inputs())
        a = attached(cell, model, "a")
        attached(cell, model, "b", seed=2)
        if case.blocks:
            if recompute:
                recompute_blocks(model)
            model.train()
        torch.manual_seed(3)
        with tt.rows(model, ["a", None, "a", "b"]):
            if recompute and not case.blocks:
                captured = tt.captured(model, lambda x, model=model: output(model, {"x": x}))
                loss = checkpoint(captured, inputs["x"], use_reentrant=False).tanh().sum()
            else:
                loss = output(model, inputs).tanh().sum()
        with tt.using(model, "b"):
            loss.backward()
        found.append(gradients(a))
    for key, gradient in found[0].items():
        other = found[1][key]
        assert (gradient is None) == (other is None), key
        if gradient is not None and other is not None:
            assert close(gradient, other, 1e-7), key


@law
def test_recomputed_mlps_give_plain_gradients(cell: Cell) -> None:
    """Gate and up and what is made of them are computed again, with the adapters that acted in the forward."""
    case = CASES[cell.model]
    found = []
    for what in ("none", "mlp"):
        model, inputs = case.model(), with_prompt(cell, case.inputs())
        a = attached(cell, model, "a")
        attached(cell, model, "b", seed=2)
        model.train()
        torch.manual_seed(3)
        with tt.rows(model, ["a", None, "a", "b"]), recomputed(model, what):
            loss = output(model, inputs).tanh().sum()
        with tt.using(model, "b"):
            loss.backward()
        assert not [m for m in model.modules() if "forward" in vars(m)]
        found.append(gradients(a))
    for key, gradient in found[0].items():
        other = found[1][key]
        assert (gradient is None) == (other is None), key
        if gradient is not None and other is not None:
            assert close(gradient, other, 1e-7), key


def recompute_blocks(model: nn.Module) -> None:
    """Checkpoint every block; transformers renamed the switch."""
    new = "activation_checkpointing_enable"
    name = new if hasattr(model, new) else "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": False})


@pytest.mark.parametrize(("method", "model"), sorted(REFUSED))
def test_a_refused_cell_raises_a_typed_error_and_changes_nothing(method: str, model: str) -> None:
    built = CASES[model].model(torch.float32)
    before = [name for name, _ in built.named_modules()]
    with pytest.raises(TrimtabError):
        tt.attach(built, Cell(method, model).value(), "a")
    assert [name for name, _ in built.named_modules()] == before
    assert all(p.requires_grad for p in built.parameters())
