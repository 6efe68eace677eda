"""Weighted combinations: equal to PEFT's where those are right, and right where they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
import trimtab.peft as face
from tests import tiny
from tests.laws.cells import Cell, registered, shaken
from tests.peft.kit import IDS, both, logits, made, quiet
from trimtab.errors import (
    ConfigError,
    DuplicateNameError,
    UnknownNameError,
    UnsupportedError,
)
from trimtab.peft.combination import KINDS, Combination
from trimtab.peft.weighted import combined

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
OTHER: dict[str, Any] = {**PLAIN, "lora_alpha": 12, "target_modules": ["v_proj", "down_proj"]}
WHOLE = {"rtol": 1e-5, "atol": 1e-5}


def density(kind: str, value: float = 0.5) -> dict[str, float]:
    return {} if kind in ("svd", "linear", "cat") else {"density": value}


# -- equal to PEFT's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", ["total", "frequency"])
@pytest.mark.parametrize(
    "kind", ["svd", "cat", "ties", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd", "dare_ties"]
)  # fmt: skip
def test_equal_to_peft(kind: str, signs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both({"a": PLAIN, "b": OTHER, "c": PLAIN})
    given = (["a", "b", "c"], [0.7, -0.4, 1.1], "new", kind)
    seeded_after_injection(monkeypatch)
    with quiet():
        theirs.add_weighted_adapter(*given, **density(kind), majority_sign_method=signs)
    torch.manual_seed(7)
    ours.add_weighted_adapter(*given, **density(kind), majority_sign_method=signs)
    torch.testing.assert_close(logits(ours, "new"), logits(theirs, "new"), **WHOLE)
    assert float((logits(ours, "new") - logits(ours, "a")).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
@pytest.mark.parametrize(("rank", "clamp"), [(1, None), (3, 0.9), (12, None)])
def test_the_rank_and_the_clamp_of_an_svd_are_pefts(
    kind: str, rank: int, clamp: float | None
) -> None:
    theirs, ours = both({"a": PLAIN, "b": OTHER})
    for model in (theirs, ours):
        with quiet("The density"):
            model.add_weighted_adapter(
                ["a", "b"], [1.0, 0.5], "new", kind, svd_rank=rank, svd_clamp=clamp, **density(kind)
            )
    torch.testing.assert_close(logits(ours, "new"), logits(theirs, "new"), **WHOLE)
    assert ours.peft_config["new"].r == rank
    assert ours.peft_config["new"].lora_alpha == rank


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd"])
@pytest.mark.parametrize("case", ["embedding", "conv1d", "patterns"])
def test_equal_to_peft_on_other_layers(kind: str, case: str) -> None:
    if case == "patterns":
        config = {**PLAIN, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
        theirs, ours = both({"a": config, "b": config})
    elif case == "embedding":
        config = {**PLAIN, "target_modules": ["embed_tokens", "q_proj"]}
        theirs, ours = both({"a": config, "b": config})
    else:
        config = {**PLAIN, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
        theirs, ours = both({"a": config, "b": config}, base=tiny.gpt2)
    for model in (theirs, ours):
        with quiet():
            model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", kind, **density(kind))
    torch.testing.assert_close(logits(ours, "new"), logits(theirs, "new"), **WHOLE)


def seeded_after_injection(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws the first values of the new adapter from the generator that DARE draws from next."""
    module = peft.tuners.lora.model
    freeze = module._freeze_adapter

    def seeded(*args: Any) -> None:
        freeze(*args)
        torch.manual_seed(7)

    monkeypatch.setattr(module, "_freeze_adapter", seeded)


# -- right where PEFT's are not -----------------------------------------------------------------------


def changes_of(model: Any, name: str, package: Any) -> dict[str, Tensor]:
    """ΔW of an adapter by layer, from its factors and its scaling."""
    found = {}
    for path, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if factors is not None and name in factors:
            a, b = factors[name].weight, module.lora_B[name].weight
            found[path] = (b @ a * module.scaling[name]).detach()
    return found


def test_linear_is_the_sum_and_pefts_has_products_across_adapters() -> None:
    theirs, ours = both({"a": PLAIN, "b": PLAIN})
    a, b = changes_of(ours, "a", face), changes_of(ours, "b", face)
    for model in (theirs, ours):
        with quiet():
            model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "new", "linear")
    new = changes_of(ours, "new", face)
    for path, change in new.items():
        torch.testing.assert_close(change, 0.7 * a[path] + 0.4 * b[path], **WHOLE)
    path = next(iter(new))
    layer = ours.get_submodule(path)
    first, second = (layer.lora_A[n].weight for n in "ab"), (layer.lora_B[n].weight for n in "ab")
    (a1, a2), (b1, b2) = first, second
    across = (0.7 * 0.4) ** 0.5 * layer.scaling["a"] * (b1 @ a2 + b2 @ a1)
    peft_change = changes_of(theirs, "new", peft)[path]
    torch.testing.assert_close(peft_change, new[path] + across, **WHOLE)
    assert bool((across.abs() > 0.1).any())


@pytest.mark.parametrize("kind", ["dare_linear", "magnitude_prune"])
def test_pruned_factors_are_summed_without_products_across_adapters(kind: str) -> None:
    _, ours = both({"a": PLAIN, "b": PLAIN})
    torch.manual_seed(3)
    ours.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", kind, density=0.5)
    how = Combination(kind, density=0.5)
    torch.manual_seed(3)
    for path, change in changes_of(ours, "new", face).items():
        layer = ours.get_submodule(path)
        left = [how.pruned(layer.lora_A[n].weight.detach()) for n in "ab"]
        right = [how.pruned(layer.lora_B[n].weight.detach()) for n in "ab"]
        expected = sum(
            w * layer.scaling["a"] * b @ a for w, a, b in zip((0.7, -0.4), left, right, strict=True)
        )
        torch.testing.assert_close(change, expected, **WHOLE)


def test_dare_keeps_the_mean() -> None:
    generator = torch.manual_seed(0)
    tensor = torch.randn(50, 40, generator=generator)
    how = Combination("dare_linear_svd", density=0.25)
    drawn = torch.stack([how.combine([tensor], [1.0]) for _ in range(400)])
    assert float((drawn != 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float((drawn.mean(0) - tensor).abs().mean()) < 0.15
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], (tensor / 0.25).expand_as(drawn)[kept])


HARD = {
    "rslora": "lora(rank=16, alpha=3, rslora=True, targets=['q_proj', 'v_proj'])",
    "offset": "lora(rank=4, alpha=3, lora_bias=True, targets=['q_proj', 'v_proj'])",
    "dora": "dora(rank=4, targets=['q_proj', 'v_proj'])",
    "pissa": "lora(rank=4, init='pissa', targets=['q_proj', 'v_proj'])",
}
"""What PEFT combines wrongly: S10, S11 and S12; and biases of B, which it forgets."""


@pytest.mark.parametrize("method", HARD.values(), ids=HARD)
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_weight_one_is_that_adapter(kind: str, method: str) -> None:
    """The base and the adapter stay too, bit for bit."""
    model = tiny.llama(num_hidden_layers=2)
    shaken(tt.attach(model, method, "a"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = acting(model, "a")
    how = Combination(kind, density=density(kind, 1.0).get("density"))
    tt.attach(model, combined(model, ["a"], [1.0], "new", how))
    assert torch.equal(acting(model, "new"), expected)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("method", HARD.values(), ids=HARD)
@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
def test_two_adapters_sum_as_merged_weights_do(kind: str, method: str) -> None:
    model = tiny.llama(num_hidden_layers=2)
    for seed, name in enumerate("ab"):
        shaken(tt.attach(model, method, name), seed=seed)
    how = Combination(kind, rank=32 if kind == "svd" else None)
    tt.attach(model, combined(model, ["a", "b"], [0.3, 0.6], "new", how))
    weights = {n: merged_weights(model, n) for n in ("a", "b", "new")}
    for name in ("a", "b", "new"):
        tt.detach(model, name)
    bare = dict(model.named_parameters())
    for key, new in weights["new"].items():
        old = bare.get(key, torch.zeros(()))  # a bias where the base has none
        expected = 0.3 * (weights["a"][key] - old) + 0.6 * (weights["b"][key] - old)
        torch.testing.assert_close(new - old, expected, **WHOLE)


def merged_weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    merged = tt.merge(model, name)
    return {k: p.detach() for k, p in merged.named_parameters() if "_proj" in k}


def test_ia3_is_the_sum_of_its_edits() -> None:
    """PEFT sums the vectors: two adapters of weight 1 that change nothing double every key and value there."""
    model = tiny.llama(num_hidden_layers=1)
    for name in "ab":
        tt.attach(model, "ia3", name)
    new = combined(model, ["a", "b"], [1.0, 1.0], "new", Combination("svd"))
    assert new.method.kind == "ia3"
    assert all(bool((tensor == 1).all()) for tensor in new.tensors.values())


# -- every method -------------------------------------------------------------------------------------

NO_LORA = {"norms", "bitfit"}
"""Methods that change vectors only: where they have no sum of their own, no LoRA can hold it."""


@pytest.mark.parametrize("method", registered())
def test_a_combination_with_itself_is_itself(method: str) -> None:
    """½ a + ½ a = a by every kind, for every method whose edit is a change of weights or has a sum."""
    model = tiny.llama(num_hidden_layers=1)
    adapter = shaken(tt.attach(model, Cell(method, "llama").value(), "a"))
    tt.attach(model, adapter.detached(name="b"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected, bare = acting(model, "a"), acting(model, None)
    assert float((expected - bare).abs().max()) > 1e-3
    worked = set()
    for kind in KINDS:
        weight = 1.0 if "ties" in kind else 0.5
        how = Combination(kind, density=density(kind, 1.0).get("density"))
        try:
            new = combined_at_any_rank(model, weight, how)
        except UnsupportedError:
            assert adapter.method.unmergeable or method in NO_LORA, kind
            continue
        worked.add(kind)
        tt.attach(model, new)
        torch.testing.assert_close(acting(model, "new"), expected, atol=1e-4, rtol=1e-4, msg=kind)
        tt.detach(model, "new")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert worked == set(KINDS) or adapter.method.unmergeable or method in NO_LORA


def combined_at_any_rank(model: nn.Module, weight: float, how: Combination) -> tt.Adapter:
    """Where the method tells no rank, one that is large enough for all."""
    try:
        return combined(model, ["a", "b"], [weight, weight], "new", how)
    except ConfigError as error:
        assert "svd_rank" in str(error)
        return combined(model, ["a", "b"], [weight, weight], "new", replace(how, rank=48))


@torch.no_grad()
def acting(model: nn.Module, who: str | None) -> Tensor:
    with tt.using(model, who):
        out: Tensor = model(input_ids=IDS).logits
    return out


def test_different_methods_are_combined_by_their_changes() -> None:
    model = tiny.llama(num_hidden_layers=1)
    for name, method in {"a": "lora(rank=3)", "b": "loha(rank=2)", "c": "ia3"}.items():
        shaken(tt.attach(model, method, name))
    new = combined(model, ["a", "b", "c"], [0.5, 2.0, 1.0], "new", Combination("linear"))
    assert new.method.kind == "lora"
    tt.attach(model, new)
    weights = {n: merged_weights(model, n) for n in ("a", "b", "c", "new")}
    for name in ("a", "b", "c", "new"):
        tt.detach(model, name)
    for key, bare in model.named_parameters():
        if key in weights["new"]:
            parts = zip("abc", (0.5, 2.0, 1.0), strict=True)
            expected = sum(w * (weights[n][key] - bare) for n, w in parts)
            torch.testing.assert_close(weights["new"][key] - bare, expected, **WHOLE)


def test_norms_are_combined_by_what_they_add() -> None:
    model = tiny.llama(num_hidden_layers=1)
    adapters = [
        shaken(tt.attach(model, f"norms(targets={targets})", name), seed=seed)
        for seed, (name, targets) in enumerate(
            {"a": "['norms']", "b": "['input_layernorm']"}.items()
        )
    ]
    new = combined(model, ["a", "b"], [0.5, -2.0], "new", Combination("svd"))
    assert new.method.kind == "norms"
    for key, tensor in new.tensors.items():
        path = key.split(".ln_tuning_layers")[0]
        frozen = model.get_submodule(path).get_parameter("base_layer.weight")
        parts = zip(adapters, (0.5, -2.0), strict=True)
        added = sum(w * (a.tensors[key] - frozen) for a, w in parts if key in a.tensors)
        torch.testing.assert_close(tensor, frozen + added, **WHOLE)
    tt.attach(model, new)
    assert not torch.equal(acting(model, "new"), acting(model, None))
    with pytest.raises(UnsupportedError, match="vector"):
        combined(model, ["a", "b"], [1.0, 1.0], "other", Combination("svd", rank=2))


def test_experts_are_combined_one_by_one() -> None:
    model = tiny.mixtral()
    for seed, name in enumerate("ab"):
        shaken(tt.attach(model, "lora(rank=2, targets=['gate_up_proj', 'down_proj'])", name), seed=seed)  # fmt: skip
    expected = combined(model, ["a", "b"], [0.5, 1.0], "sum", Combination("linear"))
    cut = combined(model, ["a", "b"], [0.5, 1.0], "cut", Combination("svd", rank=4))
    tt.attach(model, expected)
    tt.attach(model, cut)
    torch.testing.assert_close(acting(model, "cut"), acting(model, "sum"), **WHOLE)


def test_grouped_convolutions_and_biases() -> None:
    model = tiny.mixed()
    for seed, name in enumerate("ab"):
        method = "lora(rank=4, bias='lora_only', targets=['grouped', 'conv2', 'head', 'embed'])"
        shaken(tt.attach(model, method, name), seed=seed)
    new = combined(model, ["a", "b"], [0.5, -1.0], "new", Combination("linear"))
    tt.attach(model, new)
    merged = {n: dict(tt.merge(model, n).named_parameters()) for n in ("a", "b", "new")}
    for name in ("a", "b", "new"):
        tt.detach(model, name)
    for key, bare in model.named_parameters():
        if key.split(".")[0] in ("grouped", "conv2", "head", "embed"):
            a, b, sum_ = (merged[n][key] - bare for n in ("a", "b", "new"))
            torch.testing.assert_close(sum_, 0.5 * a - b, **WHOLE)


# -- what cannot be -----------------------------------------------------------------------------------


def test_an_existing_name_is_refused() -> None:
    """S9: PEFT returns without a word."""
    model = made(face, {"a": PLAIN, "b": PLAIN})
    with pytest.raises(DuplicateNameError, match="'b'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "b", "cat")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"adapters": ["a", "x"]}, UnknownNameError, "'x'"),
        ({"weights": [1.0]}, ConfigError, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, ConfigError, "finite"),
        ({"combination_type": "svdd"}, ConfigError, "Did you mean 'svd'"),
        ({"combination_type": "ties"}, ConfigError, "density"),
        ({"combination_type": "ties", "density": 0.0}, ConfigError, "density"),
        ({"density": 0.5}, ConfigError, "nothing that svd has"),
        ({"combination_type": "ties", "density": 0.5, "svd_rank": 3}, ConfigError, "ties_svd"),
        ({"svd_rank": 0}, ConfigError, "svd_rank"),
        ({"svd_clamp": 2.0}, ConfigError, "quantile"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "all"}, ConfigError, "'total'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: Any, text: str) -> None:
    model = made(face, {"a": PLAIN, "b": PLAIN})
    given = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new", **change}
    with pytest.raises(error, match=text):
        model.add_weighted_adapter(**given)
    assert list(model.peft_config) == ["a", "b"]
    assert list(model.base_model.adapters) == ["a", "b"]


def test_factors_of_different_ranks_have_no_common_signs() -> None:
    model = made(face, {"a": PLAIN, "b": {**PLAIN, "r": 2}})
    with pytest.raises(ConfigError, match="ties_svd"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "ties", density=0.5)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "linear")
    assert model.peft_config["new"].r == 6


def test_a_head_comes_along_once() -> None:
    with_head = {**PLAIN, "modules_to_save": ["score"]}
    model = made(face, {"a": with_head, "b": PLAIN}, base=tiny.llama_classifier())
    with torch.no_grad():
        head = model.get_base_model().score.modules_to_save["a"].weight
        head.add_(1)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "svd")
    assert model.peft_config["new"].modules_to_save == ["score"]
    assert torch.equal(model.get_base_model().score.modules_to_save["new"].weight, head)
    model.add_adapter("c", face.LoraConfig(**with_head))
    with pytest.raises(UnsupportedError, match="score"):
        model.add_weighted_adapter(["a", "c"], [0.5, 0.5], "other", "svd")


def test_the_new_adapter_is_written_and_read(tmp_path: Path) -> None:
    model = made(face, {"a": PLAIN, "b": OTHER})
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "new", "linear")
    expected = logits(model, "new")
    assert [n for n, p in model.named_parameters() if p.requires_grad]
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path / "new")
    torch.testing.assert_close(logits(theirs), expected, **WHOLE)


def test_a_scale_of_an_adapter_counts() -> None:
    """As in PEFT, what is combined is what acts now."""
    theirs, ours = both({"a": PLAIN, "b": PLAIN})
    for model in (theirs, ours):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("a", 0.25)
        with quiet():
            model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", "cat")
    torch.testing.assert_close(logits(ours, "new"), logits(theirs, "new"), **WHOLE)


def test_new_adapter_neither_acts_nor_learns_before_it_is_set() -> None:
    model = made(face, {"a": PLAIN, "b": PLAIN})
    expected = logits(model, "a")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), expected)
    learns = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {"a"}
    assert model.peft_config["new"].r == 4
