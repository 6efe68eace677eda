"""Several adapters at once, and adapters as values: sums, weights, interpolation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trimtab as tt
from tests import tiny as models
from tests.laws.cells import SMALL, registered, shaken
from trimtab.adapt.contract import Method
from trimtab.errors import ConfigError, UnsupportedError

IDS = torch.arange(3, 19).reshape(2, 8)
ADDITIVE = {
    "lora": "lora(rank=3, targets=['q_proj', 'embed_tokens'])",
    "offset": "lora(rank=3, lora_bias=True, rslora=True, targets=['q_proj', 'up_proj'])",
    "adalora": "adalora(rank=3, target_rank=2, targets=['q_proj', 'embed_tokens'])",
    "ia3": "ia3",
    "bitfit": "bitfit",
    "bottleneck": "bottleneck(size=4)",
    "pfeiffer": "pfeiffer(size=4)",
    "parallel": "parallel(size=4)",
    "noreft": "noreft(rank=2, first=2, last=1, layers=(1,))",
}
"""Methods whose edits have exact sums, small."""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # masters are fp32


def model() -> Any:
    return models.llama(num_hidden_layers=2).double()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def acting(adapter: tt.Adapter) -> Tensor:
    """The logits of a new model with this adapter."""
    fresh = model()
    tt.attach(fresh, adapter)
    return logits(fresh)


def made(method: str | Method, name: str = "a", seed: int = 1) -> tt.Adapter:
    """A free adapter with values away from its first ones."""
    fresh = model()
    shaken(tt.attach(fresh, method, name), seed=seed)
    return tt.detach(fresh, name)


class Probe(nn.Module):
    """One layer that every additive method can edit and that no non-linearity follows: y = W x + b."""

    def __init__(self, out: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


X = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(4, 6)


def edit_of(adapter: tt.Adapter) -> Tensor:
    """What the adapter adds to the layer's output."""
    probe = Probe().double()
    with torch.no_grad():
        base = probe(X)
        tt.attach(probe, adapter)
        return probe(X) - base


def on_probe(method: str, name: str = "a", seed: int = 1) -> tt.Adapter:
    probe = Probe().double()
    adapter = shaken(tt.attach(probe, method, name), 0.5, seed=seed)
    assert adapter.count
    return tt.detach(probe, name)


ON_PROBE = {
    "lora": "lora(rank=3, targets='layer')",
    "rslora": "lora(rank=4, alpha=3, rslora=True, targets='layer')",
    "ia3": "ia3(targets='layer', feedforward=())",
    "ia3-in": "ia3(targets='layer', feedforward='layer')",
    "bitfit": "bitfit(targets='layer')",
    "bottleneck": "bottleneck(size=4, targets='layer')",
    "pfeiffer": "pfeiffer(size=4, targets='layer')",
    "parallel": "parallel(size=4, targets='layer')",
    "scaled_parallel": "parallel(size=4, scaling='learned', targets='layer')",
    "adapterplus": "adapterplus(size=4, drop=0, targets='layer')",
    "loreft": "loreft(rank=2, first=1, last=0, dropout=0, targets='layer')",
    "noreft": "noreft(rank=2, first=1, last=0, dropout=0, targets='layer')",
    "direft": "direft(rank=2, first=1, last=0, dropout=0, tied=True, targets='layer')",
}
each = pytest.mark.parametrize("method", ON_PROBE.values(), ids=ON_PROBE)


# -- stacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", [("lora", "lora"), ("lora", "bitfit"), ("bitfit", "bitfit")], ids="+".join
)
def test_additive_adapters_sum(pair: tuple[str, str]) -> None:
    edits = []
    probe = Probe().double()
    base = probe(X)
    for number, (kind, name) in enumerate(zip(pair, "ab", strict=True)):
        shaken(tt.attach(probe, ON_PROBE[kind], name), seed=number)
        with tt.using(probe, name):
            edits.append(probe(X) - base)
    assert torch.allclose(probe(X) - base, edits[0] + edits[1])
    with tt.using(probe, ["b", "a"]):
        assert torch.allclose(probe(X) - base, edits[0] + edits[1])


def test_a_stack_nests_in_its_order() -> None:
    """The first is innermost: a rescaling outside of an addition rescales that too."""
    probe = Probe().double()
    base = probe(X)
    lora = shaken(tt.attach(probe, ON_PROBE["lora"], "lora"))
    ia3 = shaken(tt.attach(probe, ON_PROBE["ia3"], "ia3"))
    scale = ia3.tensors["layer.ia3_l"].flatten().double()
    with tt.using(probe, "lora"):
        delta = probe(X) - base
    assert lora.name == "lora" and delta.abs().max() > 0.01
    with tt.using(probe, ["lora", "ia3"]):
        assert torch.allclose(probe(X), scale * (base + delta))
    with tt.using(probe, ["ia3", "lora"]):
        assert torch.allclose(probe(X), scale * base + delta)
    tt.stack(probe, ["ia3", "lora"])
    assert torch.allclose(probe(X), scale * base + delta)
    tt.stack(probe, ["lora", "ia3"])
    assert torch.allclose(probe(X), scale * (base + delta))
    for order in (["lora", "ia3"], ["ia3", "lora"]):
        with tt.using(probe, order):
            expected = probe(X)
        assert torch.allclose(tt.merge(probe, order)(X), expected, atol=1e-6)


def test_a_stack_in_some_rows_only() -> None:
    whole = model()
    for number, kind in enumerate(ADDITIVE):
        shaken(tt.attach(whole, ADDITIVE[kind], kind), seed=number)
    owners = [["bottleneck", "ia3"], ["lora", "bitfit", "ia3"]]
    with tt.rows(whole, owners):
        together = logits(whole)
    for row, owner in enumerate(owners):
        with tt.using(whole, owner):
            assert torch.allclose(logits(whole)[row], together[row])


def test_stack_says_who_acts_and_disables_the_others() -> None:
    probe = Probe()
    for name in "abc":
        tt.attach(probe, ON_PROBE["lora"], name)
    tt.stack(probe, ["c", "a"])
    text = tt.describe(probe)
    assert "acting now: c -> a" in text and "b: lora, 33 parameters" in text
    tt.enable(probe, "b")
    assert "acting now: c -> a -> b" in tt.describe(probe)
    tt.stack(probe, [])
    assert "acting now: the bare base" in tt.describe(probe)
    with tt.rows(probe, ["a", None, ["a", "b"]]):
        assert "acting now: a, base, a+b" in tt.describe(probe)


def test_disable_is_for_the_default_and_a_scope_overrides_it() -> None:
    probe = Probe().double()
    base = probe(X)
    shaken(tt.attach(probe, ON_PROBE["lora"], "a"))
    edited = probe(X)
    tt.disable(probe, "a")
    assert torch.equal(probe(X), base)
    with tt.using(probe, "a"):
        assert torch.equal(probe(X), edited)
    tt.enable(probe, "a")
    assert torch.equal(probe(X), edited)


def test_scopes_nest_and_the_innermost_holds() -> None:
    probe = Probe().double()
    base = probe(X)
    shaken(tt.attach(probe, ON_PROBE["lora"], "a"))
    edited = probe(X)
    with tt.using(probe, None):
        with tt.using(probe, "a"):
            assert torch.equal(probe(X), edited)
        assert torch.equal(probe(X), base)
        with pytest.raises(ZeroDivisionError), tt.using(probe, "a"):
            raise ZeroDivisionError
        assert torch.equal(probe(X), base)
    assert torch.equal(probe(X), edited)


@each
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 2.0])
def test_scale_moves_that_far_from_the_base(method: str, factor: float) -> None:
    probe = Probe().double()
    adapter = on_probe(method)
    full = edit_of(adapter)
    tt.attach(probe, adapter)
    with tt.using(probe, None):
        base = probe(X)
    tt.scale(probe, "a", factor)
    assert torch.allclose(probe(X) - base, factor * full)
    if factor != 1.0:
        assert f"scale {factor:g}" in tt.describe(probe)
    tt.scale(probe, "a", 1.0)
    assert torch.allclose(probe(X) - base, full)


# -- arithmetic, by effect ----------------------------------------------------------------------------


@each
@settings(max_examples=15)
@given(weight=st.floats(-3, 3))
def test_scaled_is_linear_in_effect(method: str, weight: float) -> None:
    a = on_probe(method)
    assert torch.allclose(edit_of(tt.scaled(a, weight)), weight * edit_of(a), **CLOSE)


@each
@settings(max_examples=10)
@given(weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3))
def test_add_is_linear_in_effect(method: str, weights: list[float]) -> None:
    parts = [on_probe(method, f"p{seed}", seed) for seed in range(len(weights))]
    total = sum((w * edit_of(p) for w, p in zip(weights, parts, strict=True)), torch.zeros(4, 5))
    found = tt.add(parts, name="sum", weights=weights)
    assert found.name == "sum" and not found.attached
    assert torch.allclose(edit_of(found), total, **CLOSE)


@settings(max_examples=20)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([0.5, 4.0, 7.0]), st.booleans()),
        min_size=1,
        max_size=3,
    )
)
def test_lora_of_any_ranks_alphas_and_scalings_add(shapes: list[tuple[int, float, bool]]) -> None:
    """S10: PEFT multiplies by √r where rsLoRA is on."""
    parts = [
        on_probe(f"lora(rank={r}, alpha={a}, rslora={rs}, targets='layer')", seed=n)
        for n, (r, a, rs) in enumerate(shapes)
    ]
    found = tt.add(parts, name="sum")
    total = sum((edit_of(part) for part in parts), torch.zeros(4, 5))
    assert torch.allclose(edit_of(found), total, **CLOSE)
    if len(parts) > 1:
        assert found.tensors["layer.lora_A.weight"].shape[0] == sum(r for r, _, _ in shapes)


def test_the_sum_of_rank_patterns() -> None:
    """Where the patterns cancel out, none of them may stay behind."""
    first = made("lora(rank=4, targets=['q_proj', 'v_proj'], rank_pattern={'q_proj': 2})")
    second = made("lora(rank=4, targets=['q_proj', 'v_proj'], rank_pattern={'q_proj': 6})", seed=2)
    third = made(
        "lora(rank=3, targets=['q_proj', 'v_proj'], alpha_pattern={'layers.1.*': 3.0})", seed=3
    )
    for parts in ([first, second], [first, third], [third, first], [first, second, third]):
        found = tt.add(parts, name="sum")
        whole = model()
        for number, part in enumerate(parts):
            tt.attach(whole, part, f"p{number}")
        assert torch.allclose(acting(found), logits(whole), **CLOSE)
        for site in found.sites:
            rank = found.at_site(site.path)["lora_A.weight"].shape[0]
            assert found.method.at(site.path).rank == rank


def test_a_sum_whose_sizes_would_differ_from_site_to_site_is_refused() -> None:
    """A bottleneck has one size for all its sites."""
    parts = [made("bottleneck(size=2)"), made("bottleneck(size=2, targets='mlp_output')")]
    with pytest.raises(UnsupportedError, match="differ in size from site to site"):
        tt.add(parts, name="sum")


@pytest.mark.parametrize("kind", ADDITIVE)
def test_the_sum_of_adapters_at_different_sites(kind: str, tmp_path: Path) -> None:
    options = {
        "lora": ("lora(rank=2, targets='q_proj')", "lora(rank=3, targets=['v_proj', 'q_proj'])"),
        "offset": (
            "lora(rank=2, lora_bias=True, targets='q_proj')",
            "lora(rank=3, lora_bias=True, targets=['v_proj', 'q_proj'])",
        ),
        "adalora": (
            "adalora(rank=2, target_rank=2, targets='q_proj')",
            "adalora(rank=3, target_rank=2, targets=['v_proj', 'q_proj'])",
        ),
        "ia3": (
            "ia3(targets='keys', feedforward=())",
            "ia3(targets='values', feedforward='mlp_down')",
        ),
        "bitfit": ("bitfit(layers=[0])", "bitfit"),
        "bottleneck": (
            "bottleneck(size=2, targets='mlp_output')",
            "bottleneck(size=2, targets='o_proj')",
        ),
        "pfeiffer": ("pfeiffer(size=2)", "pfeiffer(size=2, targets='o_proj')"),
        "parallel": ("parallel(size=2)", "parallel(size=2, targets='o_proj')"),
        "noreft": (
            "noreft(rank=2, targets='layers.0')",
            "noreft(rank=2, targets='layers.1.mlp', tied=False)",
        ),
    }[kind]
    parts = [
        made(method, name, seed)
        for seed, (method, name) in enumerate(zip(options, "ab", strict=True))
    ]
    for order in (parts, parts[::-1]):
        found = tt.add(order, name="sum")
        whole = model()
        for part in order:
            tt.attach(whole, part)
        expected = logits(whole)
        assert torch.allclose(acting(found), expected, **CLOSE)
        assert {s.path for s in found.sites} == {s.path for part in parts for s in part.sites}
        found.save(tmp_path / "sum")
        loaded = tt.Adapter.load(tmp_path / "sum")
        assert loaded == found and torch.equal(acting(loaded), acting(found))


def test_a_sum_names_all_its_targets_to_peft(tmp_path: Path) -> None:
    """Not those of its first part alone, or the rest would be dropped in silence."""
    for method, other in (("q_proj", "v_proj"), ("v_proj", "down_proj")):
        parts = [made(tt.LoRA(rank=2, targets=t), t) for t in (method, other)]
        tt.add(parts, name="sum").save(tmp_path / method)
        config = json.loads((tmp_path / method / "adapter_config.json").read_text())
        for part in parts:
            for site in part.sites:
                assert any(site.path.endswith(target) for target in config["target_modules"])


# -- identities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", registered())
def test_weight_one_is_the_identity_for_every_method(kind: str) -> None:
    a = made(SMALL.get(kind, kind))
    assert tt.scaled(a, 1.0) == a
    assert tt.add([a], name="b") == a
    assert tt.add([a], name="b", weights=[1.0]) == a
    assert tt.add([a], name="b").name == "b"


def test_weight_one_is_the_identity_with_a_trained_head() -> None:
    a = made("lora(rank=2, train=['lm_head'])")
    assert tt.scaled(a, 1) == a and tt.add([a], name="b") == a


@pytest.mark.parametrize("method", ADDITIVE.values(), ids=ADDITIVE)
def test_interpolation_ends_at_its_ends(method: str) -> None:
    a, b = made(method, "a", 1), made(method, "b", 2)
    assert not torch.allclose(acting(a), acting(b), atol=1e-3)
    assert torch.allclose(acting(tt.interpolate(a, b, 0.0, name="c")), acting(a), **CLOSE)
    assert torch.allclose(acting(tt.interpolate(a, b, 1.0, name="c")), acting(b), **CLOSE)


@each
def test_interpolation_is_a_line_in_effect(method: str) -> None:
    a, b = on_probe(method, "a", 1), on_probe(method, "b", 2)
    expected = 0.75 * edit_of(a) + 0.25 * edit_of(b)
    assert torch.allclose(edit_of(tt.interpolate(a, b, 0.25, name="c")), expected, **CLOSE)


def test_values_are_not_changed_by_arithmetic_and_share_nothing_with_its_results() -> None:
    a, b = made("lora(rank=2)", "a", 1), made("lora(rank=2)", "b", 2)
    before = a.detached(), b.detached()
    results = [
        tt.scaled(a, 1.0),
        tt.scaled(a, 2.0),
        tt.add([a], name="x"),
        tt.add([a, b], name="y"),
    ]
    for result in results:
        for tensor in result.tensors.values():
            tensor.zero_()
    assert (a, b) == before


def test_attached_adapters_add_too() -> None:
    whole = model()
    a, b = (shaken(tt.attach(whole, "lora(rank=2)", n), seed=k) for k, n in enumerate("ab"))
    expected = logits(whole)
    total = tt.add([a, b], name="sum")
    assert a.attached and torch.equal(logits(whole), expected)
    assert torch.allclose(acting(total), expected, **CLOSE)
    assert not any(t.requires_grad for t in total.tensors.values())


# -- what has no sum ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("dora(rank=2)", "normalises|norm of its own factors"),
        ("compacter(size=8)", "compacter has tensors of the whole adapter"),
        ("fusion", "fusion: "),
        ("prefix(length=2)", "prefix has tensors of the whole adapter"),
        ("spottune(hidden=4)", "spottune has tensors of the whole adapter"),
        ("full(targets='lm_head')", "full"),
        ("lora(rank=2, train=['lm_head'])", "a module trained in full replaces|full: .*not linear"),
    ],
)
def test_what_has_no_exact_sum_says_why(method: str, reason: str) -> None:
    a, b = made(method, "a", 1), made(method, "b", 2)
    calls: list[Callable[[], tt.Adapter]] = [
        lambda: tt.add([a, b], name="c"),
        lambda: tt.interpolate(a, b, 0.5, name="c"),
        lambda: tt.scaled(a, 0.5),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match=reason):
            call()


def test_different_methods_do_not_add() -> None:
    with pytest.raises(ConfigError, match="not lora and ia3"):
        tt.add([made("lora(rank=2)", "a"), made("ia3", "b")], name="c")


def test_add_wants_adapters_and_a_finite_weight_for_each() -> None:
    a = made("lora(rank=2)")
    for parts, weights in (([], None), ([a], [1.0, 2.0]), ([a, a], [1.0])):
        with pytest.raises(ConfigError, match="one weight each"):
            tt.add(parts, name="c", weights=weights)
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite"):
            tt.scaled(a, weight)
        with pytest.raises(ConfigError, match="finite"):
            tt.interpolate(a, a, weight, name="c")


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize(
    ("make", "targets", "batch"),
    [
        (models.mixed, ("grouped", "conv1", "conv2"), {"x": IDS}),
        (models.mixtral, "**.experts.*_proj", {"input_ids": IDS}),
    ],
    ids=["groups", "experts"],
)
def test_ranks_of_groups_and_of_experts_are_joined_each_with_its_own(
    kind: str, make: Callable[[], nn.Module], targets: Any, batch: dict[str, Tensor]
) -> None:
    two = make()
    for seed, rank in enumerate((4, 2)):
        method = {"kind": kind, "rank": rank, "targets": targets}
        extra = {"target_rank": 2} if kind == "adalora" else {}
        shaken(tt.attach(two, method | extra, f"a{rank}"), seed=seed)
    parts = [tt.detach(copy.deepcopy(two), f"a{rank}") for rank in (4, 2)]
    one = make()
    tt.attach(one, tt.add(parts, name="sum"))
    torch.testing.assert_close(models.output(one, batch), models.output(two, batch), **CLOSE)
