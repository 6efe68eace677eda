"""Where factors begin: exactly at the base, on every kind of layer, and as what their formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.tiny import CASES, STORED, output
from trimtab.adapt.decompose import leading
from trimtab.adapt.initial import inits
from trimtab.adapt.parse import method_from
from trimtab.errors import ConfigError, DataError, UnsupportedError

MIXED = ("embed", "re:conv[12]", "grouped", "head")
DATA = ("eva", "lora-ga", "corda")
FREE = ("gaussian", "orthogonal", "pissa", "pissa(niter=2)", "olora", "mica")


def batches(name: str, rows: int = 12) -> list[dict[str, Tensor]]:
    """One batch with padding, and labels of the family's kind."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, tiny.VOCABULARY, (rows, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if type(CASES[name].make()).__name__.endswith("ForSequenceClassification"):
        labels = torch.randint(0, 3, (rows,), generator=generator)
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels}]


def method(kind: str, init: str, model: str) -> tt.Method:
    options: dict[str, Any] = {"kind": kind, "rank": 4, "alpha": 6.0, "init": init}
    if model == "mixed":
        options["targets"] = MIXED[1:] if init in DATA or kind == "dora" else MIXED
    return method_from(options)


@pytest.mark.parametrize("model", [*CASES])
@pytest.mark.parametrize("init", [*FREE, *DATA])
def test_it_begins_at_the_base_and_is_shared_as_a_plain_lora(init: str, model: str) -> None:
    case = CASES[model]
    if init in DATA and not set(case.inputs()) <= {"input_ids", "decoder_input_ids"}:
        pytest.skip("what data tell of images and convolutions is tested by itself")
    torch.manual_seed(0)
    built, inputs = case.model(torch.float32), case.inputs()
    with torch.no_grad():
        expected = output(built, inputs)
        before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
        data = batches(model) if init in DATA else None
        if init == "lora-ga" and model in STORED:
            with pytest.raises(UnsupportedError, match="one that is stored densely"):
                tt.attach(built, method("lora", init, model), "a", batches=data)
            return
        adapter = tt.attach(built, method("lora", init, model), "a", batches=data)
        first = output(built, inputs)
        # one that keeps its first factors takes them away to the last bit
        assert torch.equal(first, expected) or (
            init == "orthogonal" and (first - expected).abs().max() < 2e-6
        )
        now = built.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        trained = output(built, inputs)
        shared = tt.exported(adapter)
        again = case.model(torch.float32)
        tt.attach(again, shared)
        # an inverse makes factors of CorDA large, and what they take from one another loses digits
        near = 1e-4 if init == "corda" else 1e-5
        assert (output(again, inputs) - trained).abs().max() < near
        assert (trained - expected).abs().max() > 1e-4
    away = init not in ("gaussian", "orthogonal", "eva", "mica")
    assert bool(adapter.fixed) == (away or init == "mica")
    assert shared.count == adapter.count * (2 if away else 1)
    assert not any("first" in key for key in shared.tensors)


@pytest.mark.parametrize("init", DATA)
def test_images_tell_as_well(init: str) -> None:
    case = CASES["vit"]
    model, inputs = case.model(torch.float32), case.inputs()
    expected = output(model, inputs)
    data = [{**inputs, "labels": torch.arange(len(expected)) % expected.shape[-1]}]
    adapter = tt.attach(model, tt.LoRA(rank=2, init=init), "a", batches=data)
    assert torch.equal(output(model, inputs), expected)
    assert all(bool(t.any()) for key, t in adapter.tensors.items() if "lora_A" in key)


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        (kind, init)
        for kind in ("lora", "dora")
        for init in (*FREE, *DATA)
        if (kind, init) != ("dora", "mica")
    ],
)
def test_the_laws_of_merging_adding_and_files(kind: str, init: str, tmp_path: Any) -> None:
    case = CASES["mixtral"]
    model, inputs = case.model(), case.inputs()
    data = batches("mixtral") if init in DATA else None
    adapter = tt.attach(model, method(kind, init, "mixtral"), "a", batches=data)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = output(model, inputs)
        assert (output(tt.merge(model, "a"), inputs) - expected).abs().max() < 1e-6
        adapter.save(tmp_path / "a")
        assert tt.Adapter.load(tmp_path / "a") == adapter
        fresh = case.model()
        tt.attach(fresh, tt.Adapter.load(tmp_path / "a"))
        assert torch.equal(output(fresh, inputs), expected)
        if kind == "lora":
            summed = tt.add([adapter, adapter.detached()], name="s", weights=[0.25, 0.75])
            third = case.model()
            tt.attach(third, summed)
            assert (output(third, inputs) - expected).abs().max() < 1e-5


def test_the_first_factors_are_never_trained() -> None:
    model = tiny.llama()
    adapter = tt.attach(model, tt.LoRA(rank=2, init="pissa"), "a")
    kept = {n.key: t.clone() for n, t in adapter.named().items() if n in adapter.fixed}
    optimiser = torch.optim.AdamW(tt.parameter_groups(adapter, lr=0.1))
    ids = torch.arange(3, 11)[None]
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    assert kept and all(torch.equal(adapter.tensors[key], value) for key, value in kept.items())
    assert all(not torch.equal(adapter.tensors[k.replace("_first", "")], kept[k]) for k in kept)


def test_pissa_of_a_convolution_is_the_best_of_its_rank_in_each_group() -> None:
    model = tiny.mixed()
    layer = model.grouped  # 2 groups of 4 channels, each seeing 6 channels with a kernel of 3
    adapter = tt.attach(model, tt.LoRA(rank=4, alpha=8, targets="grouped", init="pissa"), "a")
    a, b = (adapter.tensors[f"grouped.lora_{side}.weight"].detach() for side in "AB")
    change = 2.0 * torch.bmm(b.reshape(2, 4, 2), a.reshape(2, 2, 18))
    weight = layer.weight.detach().reshape(2, 4, 18)
    left = torch.linalg.svdvals(weight)[:, 2:].square().sum()
    assert float((weight - change).square().sum()) == pytest.approx(float(left), rel=1e-4)


def test_seeds_and_repeats() -> None:
    one, two, other = (
        tt.attach(tiny.llama(), tt.LoRA(rank=2, init="orthogonal"), "a", seed=seed)
        for seed in (0, 0, 1)
    )
    assert one == two and one != other


def test_eva_shares_its_ranks_out_by_what_they_explain() -> None:
    model = tiny.llama()
    adapter = tt.attach(model, tt.LoRA(rank=4, init="eva"), "a", batches=batches("llama"))
    ranks = [adapter.method.at(site.path).rank for site in adapter.sites]
    assert sum(ranks) == 4 * 21 and max(ranks) <= 8 and len(set(ranks)) > 1
    assert {adapter.method.at(site.path).scaling for site in adapter.sites} == {8.0}
    again = tt.attach(tiny.llama(), adapter.method, "a", batches=batches("llama"))
    assert again.method == adapter.method


def test_eva_leaves_out_a_layer_whose_inputs_say_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.busy, self.still = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            alike = x[:, :1] * torch.ones(16) + 1e-3 * x
            y: Tensor = self.busy(x[:, :2] @ torch.eye(2, 16)) + self.still(alike)
            return y

    torch.manual_seed(0)
    model = Two()
    adapter = tt.attach(
        model, tt.LoRA(rank=1, init="eva", targets="all-linear"), "a", batches=[torch.randn(64, 16)]
    )
    assert {s.path: adapter.method.at(s.path).rank for s in adapter.sites} == {
        "busy": 1,
        "still": 1,
    }
    a = adapter.tensors["still.lora_A.weight"].detach()
    assert float(a.abs().sum()) == pytest.approx(
        4.0, abs=1e-2
    )  # the direction of all ones, of length 1


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("pisa", ConfigError, "Did you mean 'pissa'"),
        ("pissa(iterations=3)", ConfigError, "niter"),
        ("eva(rho=0.5)", ConfigError, "rho"),
        ("lora_ga(direction='up')", ConfigError, "direction"),
        ("pissa(", ConfigError, "write a name and options"),
    ],
)
def test_a_misspelt_init_is_told(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tt.LoRA(init=text)


@pytest.mark.parametrize(
    ("text", "targets", "error", "message"),
    [
        ("orthogonal", "q_proj", ConfigError, "even"),
        ("pissa", "k_proj", ConfigError, "at most 16"),
        ("lora-ga", "q_proj", ConfigError, "at most 16"),
        ("eva", "embed_tokens", UnsupportedError, "token ids"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_changes(
    text: str, targets: str, error: type[Exception], message: str
) -> None:
    model = tiny.llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        tt.attach(
            model, tt.LoRA(rank=17, init=text, targets=targets), "a", batches=batches("llama")
        )
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_eva_needs_as_many_inputs_as_directions() -> None:
    data = [{"input_ids": torch.arange(3, 6)[None]}]
    with pytest.raises(DataError, match="give more batches"):
        tt.attach(tiny.llama(), tt.LoRA(rank=8, init="eva(rho=1)"), "a", batches=data)


def test_strings_and_files_give_the_same_value() -> None:
    text = tt.method("lora(rank=4, init=pissa(niter=4))")
    assert text == tt.LoRA(rank=4, init="pissa(niter=4)")
    assert method_from(text.to_dict()) == text
    names = ["corda", "eva", "gaussian", "loftq", "lora-ga", "mica", "olora", "orthogonal", "pissa"]
    assert inits.names() == names


def test_leading_vectors_are_the_exact_ones_where_they_stand_out() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 30), (30, 40)):
        u, _ = torch.linalg.qr(torch.randn(shape[0], 30, generator=generator))
        v, _ = torch.linalg.qr(torch.randn(shape[1], 30, generator=generator))
        s = 10.0 ** -torch.arange(30.0).div(4)
        matrix = (u * s) @ v.T
        found = leading(matrix, 6, 4, generator)
        exact = torch.linalg.svd(matrix)
        torch.testing.assert_close(found[1], exact[1][:6], atol=1e-5, rtol=1e-4)
        for mine, true in ((found[0].T, exact[0].T), (found[2], exact[2])):
            cosines = (mine[:5] * true[:5]).sum(1).abs()
            torch.testing.assert_close(cosines, torch.ones(5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "eva", "lora-ga"])
def test_a_method_around_another_hands_on_what_it_asks_for(init: str) -> None:
    model = tiny.llama()
    inner = tt.LoRA(rank=2, init=init, targets=("q_proj", "down_proj"))
    adapter = tt.attach(model, tt.SpotTune(inner=inner, hidden=4), "a", batches=batches("llama"))
    kept = {name for name in adapter.fixed if name.path}
    assert bool(kept) == (init != "eva")
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    with torch.no_grad():
        for name, tensor in adapter.named().items():
            if name not in adapter.fixed:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        again = tiny.llama()
        tt.attach(again, tt.exported(adapter))
        assert (output(again, inputs) - output(model, inputs)).abs().max() < 1e-5
