"""The 26 silent failures of the incumbent (PEFT 0.21.2), each a test of ours.

Each docstring says what PEFT does and what Trimtab does. Where it is cheap, the test also lets PEFT fail in that
way, so that the claim is shown and not only said: warnings are errors here, so what passes below `kit.quiet` was
silent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from transformers import AutoModelForCausalLM

import trimtab as tt
from tests import tiny as models
from tests.laws.cells import REFUSED, Cell, attached, registered, shaken
from tests.oracles import kit
from tests.tiny import output, pick
from trimtab.adapt.files import WEIGHTS
from trimtab.adapt.probe import bare_state
from trimtab.errors import (
    AttachError,
    BaseMismatchError,
    ConfigError,
    DuplicateNameError,
    FileFormatError,
    TargetError,
    UnknownNameError,
    UnsupportedError,
)

IDS = {"input_ids": torch.arange(3, 35).reshape(4, 8)}
ON_LLAMA = [name for name in registered() if (name, "llama") not in REFUSED]


@torch.no_grad()
def logits(model: nn.Module, who: Any = "all") -> Tensor:
    """With the adapters of ``who``; by default with whatever acts."""
    if who == "all":
        return output(model, IDS)
    with tt.using(model, who):
        return output(model, IDS)


def logits_of(theirs: nn.Module) -> Tensor:
    """Of a model of PEFT's."""
    with torch.no_grad():
        return output(theirs, IDS)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bare_state(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def theirs(make: Callable[[], nn.Module] = kit.llama, **options: Any) -> PeftModel:
    """PEFT's LoRA with factors away from zero."""
    made = kit.peft_model(make, LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **options}))
    return stirred(made)


@torch.no_grad()
def stirred(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name or "modules_to_save" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def saved(folder: Path, method: str = "lora(rank=2, targets='q_proj')", name: str = "a") -> Path:
    return shaken(tt.attach(kit.llama(), method, name)).save(folder)


# -- what is adapted ----------------------------------------------------------------------------------


def test_s01_a_target_that_matches_nothing() -> None:
    """PEFT adapts the targets that match and drops the misspelt one. Trimtab: `TargetError`, nothing changed."""
    adapted = theirs(target_modules=["q_proj", "v_prj"])
    assert not any("v_proj" in name and "lora" in name for name, _ in adapted.named_modules())
    model = kit.llama()
    before = list(model.state_dict())
    with pytest.raises(TargetError, match=r"'v_prj' matches no module.*Did you mean 'v_proj'"):
        tt.attach(model, tt.LoRA(targets=("q_proj", "v_prj")))
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("method", ON_LLAMA)
def test_s01_for_every_method(method: str) -> None:
    """No method passes over a target, an exclusion or a layer that it is given."""
    value = Cell(method, "llama").value()
    for wrong in ({"targets": "v_prj"}, {"exclude": "v_prj"}, {"layers": (7,)}):
        model = models.llama()
        before = list(model.state_dict())
        with pytest.raises((TargetError, ConfigError)):
            tt.attach(model, value.replace(**wrong))
        assert list(model.state_dict()) == before, wrong


def test_s02_a_module_to_train_that_matches_nothing() -> None:
    """PEFT trains nothing in its place and says nothing. Trimtab: `TargetError`."""
    trained = theirs(modules_to_save=["lm_haed"])
    assert not any("modules_to_save" in name for name, _ in trained.named_parameters())
    with pytest.raises(TargetError, match=r"'lm_haed' matches no module.*'lm_head'"):
        tt.attach(kit.llama(), tt.LoRA(targets="q_proj", train=("lm_haed",)))


def test_s03_a_name_that_ends_other_names() -> None:
    """PEFT's modules_to_save=["norm"] also trains every input_layernorm. Trimtab: names match whole segments."""
    trained = theirs(modules_to_save=["norm"])
    assert any("input_layernorm.modules_to_save" in name for name, _ in trained.named_parameters())
    adapter = tt.attach(kit.llama(), tt.LoRA(targets="q_proj", train=("norm",)))
    assert [site.path for site in adapter.sites if site.method] == ["model.norm"]


def test_s04_a_layer_that_does_not_exist() -> None:
    """PEFT ignores index 7 of a model with three layers. Trimtab: `TargetError`."""
    theirs(layers_to_transform=[0, 7])
    with pytest.raises(TargetError, match=r"layers \[7\] do not exist: .* has blocks 0 to 2"):
        tt.attach(kit.llama(), tt.LoRA(targets="q_proj", layers=(0, 7)))


# -- files --------------------------------------------------------------------------------------------


def test_s05_keys_that_nobody_asked_for(tmp_path: Path) -> None:
    """PEFT drops extra keys of a file. Trimtab: `FileFormatError` for its own folders and for PEFT's."""
    theirs(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "peft")
    whole = load_file(tmp_path / "peft" / WEIGHTS)
    extra = {f"{key}x": tensor.clone() for key, tensor in whole.items() if "v_proj" in key}
    save_file({**whole, **extra}, tmp_path / "peft" / WEIGHTS)
    with kit.quiet():
        PeftModel.from_pretrained(kit.llama(), tmp_path / "peft")
    with pytest.raises(FileFormatError, match="belongs to no tensor of the method"):
        tt.Adapter.load(tmp_path / "peft")
    ours = saved(tmp_path / "ours")
    save_file({**load_file(ours / WEIGHTS), "stowaway": torch.zeros(1)}, ours / WEIGHTS)
    with pytest.raises(FileFormatError, match="1 unexpected, e.g. 'stowaway'"):
        tt.Adapter.load(ours)


def test_s06_a_misspelt_argument(tmp_path: Path) -> None:
    """PEFT's from_pretrained swallows any argument. Trimtab: no function takes what it does not know."""
    theirs().save_pretrained(tmp_path / "peft")
    with kit.quiet():
        loaded = PeftModel.from_pretrained(kit.llama(), tmp_path / "peft", is_trainble=True)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    folder, model = saved(tmp_path / "ours"), kit.llama()
    for call in (
        lambda: tt.attach(model, tt.Adapter.load(folder), trainble=True),  # type: ignore[call-arg]
        lambda: tt.Adapter.load(folder, lora_alpha=999),  # type: ignore[call-arg]
        lambda: tt.attach(model, "lora", rank=4),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call()
    with pytest.raises(UnknownNameError, match="unknown option 'lora_alpha'"):
        tt.LoRA(lora_alpha=999)


def test_s07_another_adapter_under_a_name_that_is_taken(tmp_path: Path) -> None:
    """PEFT loads the new weights and keeps the old alpha. Trimtab: `DuplicateNameError`; config and weights are one."""
    theirs(lora_alpha=64).save_pretrained(tmp_path / "peft")
    holder = theirs(lora_alpha=4)
    with kit.quiet():
        holder.load_adapter(tmp_path / "peft", "default")
    assert holder.peft_config["default"].lora_alpha == 4  # and so another function
    folder = saved(tmp_path / "ours", "lora(rank=2, alpha=64, targets='q_proj')")
    model = kit.llama()
    tt.attach(model, "lora(rank=2, alpha=4, targets='q_proj')", "a")
    with pytest.raises(DuplicateNameError, match="'a' is attached already; detach it first"):
        tt.attach(model, tt.Adapter.load(folder))
    tt.detach(model, "a")
    adapter = tt.attach(model, tt.Adapter.load(folder))
    alone = kit.llama()
    tt.attach(alone, tt.Adapter.load(folder))
    assert dict(adapter.method)["alpha"] == 64 and torch.equal(logits(model), logits(alone))


def test_s08_an_adapter_named_like_a_module(tmp_path: Path) -> None:
    """PEFT writes an empty file for "default" where another adapter is called "layers". Trimtab: all tensors."""
    pair = theirs()
    with kit.quiet():
        pair.add_adapter("layers", LoraConfig(target_modules=["q_proj"], r=2))
        pair.save_pretrained(tmp_path / "peft", selected_adapters=["default"])
    assert load_file(tmp_path / "peft" / WEIGHTS) == {}
    for other in ("layers", "self_attn", "model"):
        model = kit.llama()
        adapter = shaken(tt.attach(model, "lora(rank=2, targets='q_proj')", "default"))
        tt.attach(model, "lora(rank=2, targets='q_proj')", other)
        adapter.save(tmp_path / other)
        assert len(load_file(tmp_path / other / WEIGHTS)) == len(adapter.tensors) == 6
        assert tt.Adapter.load(tmp_path / other) == adapter


# -- arithmetic ---------------------------------------------------------------------------------------


def test_s09_a_sum_under_a_name_that_is_taken() -> None:
    """PEFT's add_weighted_adapter onto a name that exists does nothing. Trimtab: `DuplicateNameError`."""
    pair = theirs()
    with kit.quiet():
        pair.add_adapter("b", LoraConfig(target_modules=["q_proj"], r=2))
        before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
        pair.base_model.add_weighted_adapter(["default"], [2.0], "b", combination_type="linear")
    assert same(dict(pair.state_dict()), before)
    model = kit.llama()
    a = shaken(tt.attach(model, "lora(rank=2)", "a"))
    tt.attach(model, "lora(rank=2)", "b")
    with pytest.raises(DuplicateNameError, match="'b' is attached already"):
        tt.attach(model, tt.add([a], weights=[2.0], name="b"))


@pytest.mark.parametrize("rslora", [False, True])
def test_s10_a_sum_of_rank_stabilised_lora(rslora: bool) -> None:
    """PEFT's sum with weight 1 of one rsLoRA is √r times it. Trimtab: it is the identity, and sums are exact."""
    lone = theirs(r=16, use_rslora=True)
    with torch.no_grad(), kit.quiet():
        expected = output(lone, IDS)
        lone.base_model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
        lone.set_adapter("sum")
        assert not torch.allclose(output(lone, IDS), expected, atol=1e-2)
    model = kit.llama()
    a, b = (
        shaken(tt.attach(model, tt.LoRA(rank=16, rslora=rslora, targets="q_proj"), name), seed=seed)
        for seed, name in enumerate("ab")
    )
    assert tt.add([a], weights=[1.0], name="one") == a
    tt.attach(model, tt.add([a, b], name="sum"))
    torch.testing.assert_close(
        logits(model, "sum"), logits(model, ["a", "b"]), atol=1e-4, rtol=1e-4
    )


def test_s11_a_sum_of_dora() -> None:
    """PEFT adds DoRA's factors and gets another function. Trimtab: weight 1 is the identity, the rest is refused."""
    lone = theirs(use_dora=True)
    with torch.no_grad(), kit.quiet():
        expected = output(lone, IDS)
        lone.base_model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
        lone.set_adapter("sum")
        assert not torch.allclose(output(lone, IDS), expected, atol=1e-2)
    model = kit.llama()
    a, b = (
        shaken(tt.attach(model, "dora(rank=2)", name), seed=seed) for seed, name in enumerate("ab")
    )
    assert tt.add([a], weights=[1.0], name="one") == a
    for call in (
        lambda: tt.add([a, b], name="c"),
        lambda: tt.scaled(a, 0.5),
        lambda: tt.interpolate(a, b, 0.5, name="c"),
    ):
        with pytest.raises(UnsupportedError, match="dora: "):
            call()


@pytest.mark.parametrize("method", ON_LLAMA)
def test_s12_the_base_is_never_written(method: str) -> None:
    """PEFT's PiSSA changes the frozen weight, and so the adapters beside it. Trimtab: no method writes the base."""
    model = models.llama()
    before = state(model)
    first = attached(Cell(method, "llama"), model, "a")
    expected = logits(model, "a")
    shaken(tt.attach(model, Cell(method, "llama").value(), "b"), seed=2)
    tt.attach(model, tt.add([first], weights=[1.0], name="c"))
    assert torch.equal(logits(model, "a"), expected) and torch.equal(logits(model, "c"), expected)
    for name in "cba":
        tt.detach(model, name)
    assert same(state(model), before)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_s12_a_start_from_the_base_is_kept_in_the_adapter(init: str) -> None:
    """What PiSSA and its like would take out of the base stays in the adapter, through sums and other adapters."""
    model = models.llama()
    before, bare = state(model), logits(model)
    first = tt.attach(model, f"lora(rank=2, init={init})", "a")
    torch.testing.assert_close(logits(model, "a"), bare, atol=1e-5, rtol=1e-5)
    shaken(first)
    expected = logits(model, "a")
    tt.attach(model, tt.add([first], weights=[1.0], name="b"))
    tt.attach(model, tt.exported(first, name="c"))
    assert torch.equal(logits(model, "a"), expected)
    for name in "bc":
        torch.testing.assert_close(logits(model, name), expected, atol=1e-5, rtol=1e-5)
    for name in "cba":
        tt.detach(model, name)
    assert same(state(model), before)


def test_s12_the_incumbent_writes_it() -> None:
    """What S12 says of PEFT."""
    model = kit.peft_model(
        kit.llama, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    )
    before, frozen = output(model, IDS), q_proj(model).weight.clone()
    with kit.quiet():
        model.base_model.add_weighted_adapter(["default"], [1.0], "s", combination_type="linear")
    model.set_adapter("default")
    assert not torch.allclose(q_proj(model).weight, frozen, atol=1e-2)
    assert not torch.allclose(output(model, IDS), before, atol=1e-3)


def q_proj(model: PeftModel) -> nn.Linear:
    layer: nn.Linear = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    return layer


# -- merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [False, True])
def test_s13_layers_that_occur_twice(replicas: bool, tmp_path: Path) -> None:
    """PEFT merges a model with replicated layers into a wrong one. Trimtab: a layer that is called twice is one
    site, one that shares its weight with another is a site of its own, and merge ≡ forward for both; a file with
    layer_replication asks for a model whose layers are repeated so."""
    model = models.llama(use_cache=False).double()
    first, second = model.model.layers[0], model.model.layers[1]
    again = copy.deepcopy(first) if replicas else first
    if replicas:
        for (_, mine), (_, its) in zip(first.named_modules(), again.named_modules(), strict=True):
            its._parameters.update(mine._parameters)
    model.model.layers = nn.ModuleList([first, again, second])
    before = state(model)
    adapter = shaken(tt.attach(model, "lora(rank=2)", "a"))
    assert len(adapter.sites) == 7 * (3 if replicas else 2)
    expected = logits(model)
    assert not torch.allclose(expected, logits(model, None), atol=1e-3)
    torch.testing.assert_close(logits(tt.merge(model, "a"), "all"), expected)
    assert same(state(model), before)
    replicated = theirs(layer_replication=[[0, 2], [1, 3]])
    replicated.config.use_cache = False
    replicated.save_pretrained(tmp_path)
    bare = logits_of(replicated)
    assert not torch.allclose(logits_of(replicated.merge_and_unload()), bare, atol=1e-2)
    with pytest.raises(AttachError, match="layer_replication"):
        tt.attach(models.llama(), tt.Adapter.load(tmp_path))


def test_s14_merging_into_a_tied_head(tmp_path: Path) -> None:
    """PEFT writes the merged head into the embedding too. Trimtab: the head gets its own weight, here and on disk."""
    with kit.quiet(""):  # it warns
        tied = theirs(lambda: models.llama(tie_word_embeddings=True), target_modules=["lm_head"])
        unmerged = logits_of(tied)
        assert not torch.allclose(logits_of(tied.merge_and_unload()), unmerged, atol=1e-2)
    model = models.llama(tie_word_embeddings=True)
    shaken(tt.attach(model, "lora(rank=4, targets='lm_head')", "a"))
    expected, embedding = logits(model), model.model.embed_tokens.weight.clone()
    merged = tt.merge(model, "a")
    torch.testing.assert_close(output(merged, IDS), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert merged.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(again, IDS), expected, atol=1e-5, rtol=1e-5)


def test_s15_merging_ten_times() -> None:
    """PEFT's merge and unmerge of a bf16 base leaves its weights changed. Trimtab: merging makes a new model."""
    drifting = theirs(lambda: kit.llama().to(torch.bfloat16))
    weight = q_proj(drifting).weight
    old = weight.clone()
    for _ in range(10):
        drifting.merge_adapter()
        drifting.unmerge_adapter()
    assert (weight != old).float().mean() > 0.1
    model = kit.llama().to(torch.bfloat16)
    before = state(model)
    adapter = shaken(tt.attach(model, "lora(rank=2, targets='q_proj')", "a"))
    results = [tt.merge(model, "a").state_dict() for _ in range(10)]
    assert all(same(dict(one), dict(other)) for one, other in pairwise(results))
    for _ in range(10):
        tt.detach(model, "a")
        tt.attach(model, adapter)
    assert same(state(model), before)


def test_s16_merging_an_adapter_that_does_not_act() -> None:
    """PEFT merges the named factors with the active adapter's head. Trimtab: one adapter is one thing."""
    pair = theirs(modules_to_save=["lm_head"])
    alone = logits_of(pair)
    with kit.quiet():
        pair.add_adapter("b", LoraConfig(target_modules=["q_proj"], r=2))
        pair.set_adapter("b")
        mixture = pair.merge_and_unload(adapter_names=["default"])
    assert not torch.allclose(logits_of(mixture), alone, atol=1e-2)
    model = models.llama()
    shaken(tt.attach(model, "lora(rank=2, train=['lm_head'])", "a"))
    shaken(tt.attach(model, "lora(rank=2)", "b"), seed=2)
    expected = logits(model, "a")
    for acting in (["b"], ["a", "b"], []):
        tt.stack(model, acting)
        torch.testing.assert_close(
            output(tt.merge(model, "a"), IDS), expected, atol=1e-4, rtol=1e-4
        )


# -- who acts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_LLAMA)
def test_s17_one_adapter_a_row_for_every_method(method: str) -> None:
    """PEFT's adapter_names is ignored by (IA)³, VeRA and prompt tuning. Trimtab: rows act for every method."""
    model = models.llama().double()
    attached(Cell(method, "llama"), model, "a")
    with torch.no_grad(), tt.rows(model, [None, "a", None, "a"]):
        mixed = output(model, IDS)
    for row, name in enumerate([None, "a", None, "a"]):
        with torch.no_grad(), tt.using(model, name):
            torch.testing.assert_close(mixed[row], output(model, pick(IDS, [row]))[0])
    assert not torch.allclose(mixed, logits(model, None))


def test_s17_the_incumbent_ignores_the_rows() -> None:
    """What S17 says of PEFT's (IA)³."""
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = stirred(kit.peft_model(kit.llama, config))
    with torch.no_grad(), kit.quiet():
        asked = model(**IDS, adapter_names=["__base__"] * 4).logits
        with model.disable_adapter():
            bare = output(model, IDS)
        assert torch.equal(asked, output(model, IDS)) and not torch.allclose(asked, bare, atol=1e-3)


def test_s18_another_base(tmp_path: Path) -> None:
    """PEFT loads an adapter onto any base of the same shapes. Trimtab: `BaseMismatchError`, unless asked to."""

    def other() -> nn.Module:
        model = kit.llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        return model

    theirs().save_pretrained(tmp_path / "peft")
    with kit.quiet():
        PeftModel.from_pretrained(other(), tmp_path / "peft")
    folder = saved(tmp_path / "ours")
    with pytest.raises(BaseMismatchError, match=r"weights differ.*any_base=True"):
        tt.attach(other(), tt.Adapter.load(folder))
    tt.attach(other(), tt.Adapter.load(folder), any_base=True)


def test_s19_loading_while_training(tmp_path: Path) -> None:
    """PEFT's load_adapter switches the whole model to eval. Trimtab: attaching changes no mode."""
    theirs().save_pretrained(tmp_path / "peft")
    training = theirs().train()
    with kit.quiet():
        training.load_adapter(tmp_path / "peft", "reference")
    assert not training.training
    model = kit.llama().train()
    tt.attach(model, "lora(rank=2, targets='q_proj')", "a")
    folder = saved(tmp_path / "ours", name="reference")
    modes = {name: module.training for name, module in model.named_modules()}
    reference = tt.attach(model, tt.Adapter.load(folder), trainable=False)
    tt.detach(model, "reference")
    tt.attach(model, reference, trainable=False)
    assert {name: m.training for name, m in model.named_modules() if name in modes} == modes
    assert all(module.training for module in model.modules())


def test_s20_acting_and_learning_are_separate(tmp_path: Path) -> None:
    """PEFT's set_adapter makes an adapter that was loaded for inference trainable. Trimtab: nothing but
    ``trainable`` and `requires_grad_` decides what learns."""
    theirs().save_pretrained(tmp_path / "peft")
    with kit.quiet():
        loaded = PeftModel.from_pretrained(kit.llama(), tmp_path / "peft")
        assert not any(p.requires_grad for p in loaded.parameters())
        loaded.set_adapter("default")
    assert any(p.requires_grad for p in loaded.parameters())
    model = kit.llama()
    learns = tt.attach(model, "lora(rank=2)", "learns")
    fixed = tt.attach(model, tt.Adapter.load(saved(tmp_path / "ours")), "fixed", trainable=False)

    def trained() -> tuple[set[bool], ...]:
        return tuple({p.requires_grad for p in adapter.parameters()} for adapter in (learns, fixed))

    for act in (
        lambda: tt.stack(model, ["fixed"]),
        lambda: tt.disable(model, "learns"),
        lambda: tt.enable(model, "learns"),
        lambda: tt.scale(model, "fixed", 0.5),
        lambda: logits(model, "fixed"),
        lambda: tt.stack(model, ["learns", "fixed"]),
    ):
        act()
        assert trained() == ({True}, {False})
    output(model, IDS).sum().backward()
    assert all(p.grad is None for p in fixed.parameters())


def test_s21_disabled_with_trained_biases() -> None:
    """PEFT trains the base's own biases, so that its disabled model is another. Trimtab: bitwise the base."""
    config = LoraConfig(target_modules=["query"], r=2, bias="all")
    trained = kit.peft_model(kit.bert, config)
    with torch.no_grad():
        bare = output(trained, IDS)
        for parameter in trained.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
        with kit.quiet("Careful, disabling adapter layers with bias"), trained.disable_adapter():
            assert not torch.allclose(output(trained, IDS), bare, atol=1e-4)
    model = kit.bert()
    base, before = logits(model), state(model)
    shaken(tt.attach(model, tt.LoRA(rank=2, targets="query", bias="all"), "a"))
    assert not torch.allclose(logits(model), base, atol=1e-3)
    tt.disable(model, "a")
    assert torch.equal(logits(model), base) and torch.equal(logits(model, None), base)
    assert same(state(model), before)


# -- values and types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_LLAMA)
def test_s22_a_bf16_base_stays_bf16(method: str) -> None:
    """PEFT's prepare_model_for_kbit_training turns a plain bf16 model into fp32. Trimtab has no such function:
    attaching changes no dtype of the base, masters are fp32, and the computation is the base's."""
    model = models.llama().to(torch.bfloat16)
    before = state(model)
    adapter = attached(Cell(method, "llama"), model)
    assert {t.dtype for t in adapter.parameters() if t.is_floating_point()} == {torch.float32}
    assert output(model, IDS).dtype == torch.bfloat16
    output(model, IDS).float().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters() if p.grad is not None} == {torch.float32}
    after = state(model)
    assert same(after, before) and {k: t.dtype for k, t in after.items()} == {
        k: t.dtype for k, t in before.items()
    }


def test_s22_the_incumbent_turns_it_into_fp32() -> None:
    """What S22 says of PEFT."""
    prepared = prepare_model_for_kbit_training(
        models.llama().to(torch.bfloat16), use_gradient_checkpointing=False
    )
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}


def test_s23_a_method_is_a_value(tmp_path: Path) -> None:
    """PEFT writes the resolved targets into the caller's config. Trimtab: methods are frozen; sites are apart."""
    config = LoraConfig(target_modules="all-linear", r=2)
    with kit.quiet():
        get_peft_model(kit.llama(), config)
    assert config.target_modules != "all-linear"
    method = tt.LoRA(rank=2, train=("lm_head",))
    before = method.to_dict()
    for make in (kit.llama, kit.gpt2):  # one value, for two models
        model = make()
        adapter = tt.attach(model, method, "a")
        adapter.save(tmp_path / type(model).__name__)
        tt.merge(model, "a")
        assert method.to_dict() == before and adapter.method is method
        assert tt.Adapter.load(tmp_path / type(model).__name__).method == method
        assert len(adapter.sites) > 1
    with pytest.raises((TypeError, ValueError), match="frozen"):
        method.targets = ("q_proj",)  # type: ignore[misc]


def test_s24_saving_biases_raises_no_false_alarm(tmp_path: Path) -> None:
    """PEFT warns of an invalid shape and of ZeRO-3 when it saves a trained 1-D bias. Trimtab: no word (a warning
    is an error here), and the bias is there."""
    alarmed = theirs(kit.bert, target_modules=["query"], lora_bias=True)
    with pytest.warns(UserWarning, match="ZeRO"):
        alarmed.save_pretrained(tmp_path / "peft")
    for number, options in enumerate(({"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True})):
        model, folder = kit.bert(), tmp_path / str(number)
        adapter = shaken(tt.attach(model, tt.LoRA(rank=2, targets="query", **options), "a"))
        adapter.save(folder)
        again = kit.bert()
        tt.attach(again, tt.Adapter.load(folder))
        assert torch.equal(logits(again), logits(model))
        assert any(tensor.dim() == 1 for tensor in load_file(folder / WEIGHTS).values())


@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"lora_bias": True}])
def test_s25_a_trained_bias_is_merged_at_its_scale(
    options: dict[str, Any], scale: float, rslora: bool
) -> None:
    """PEFT's quantised merges add a trained bias without its scaling. Trimtab: one merge, by the forward itself."""
    model = kit.bert().double()
    method = tt.LoRA(rank=4, alpha=6, rslora=rslora, targets="all-linear", **options)
    shaken(tt.attach(model, method, "a"))
    tt.scale(model, "a", scale)
    expected = logits(model)
    assert not torch.allclose(expected, logits(model, None), atol=1e-3)
    torch.testing.assert_close(output(tt.merge(model, "a"), IDS), expected, atol=1e-5, rtol=1e-5)


class Doubled(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_s26_beside_a_parametrization_nothing_leaks() -> None:
    """PEFT leaves one proxy a forward on an expert parameter that has another parametrization. Trimtab: it makes
    none; experts are computed with their tensors as arguments, and a foreign parametrization stays as it is."""
    model = models.mixtral()
    base = logits(model)
    for layer in model.model.layers:
        register_parametrization(layer.self_attn.o_proj, "weight", Doubled())
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)
    shaken(tt.attach(model, "lora(rank=2, targets=['gate_up_proj', 'down_proj', 'o_proj'])", "a"))
    names = [name for name, _ in model.named_modules()]
    first = logits(model)
    for _ in range(3):
        assert torch.equal(logits(model), first)
    assert [name for name, _ in model.named_modules()] == names
    assert not torch.allclose(first, base, atol=1e-3)
    torch.testing.assert_close(output(tt.merge(model, "a"), IDS), first, atol=1e-4, rtol=1e-4)
    tt.detach(model, "a")
    assert torch.equal(logits(model), logits(model)) and torch.allclose(logits(model), base)
    assert all(is_parametrized(layer.self_attn.o_proj) for layer in model.model.layers)


def test_all_26_are_here() -> None:
    numbers = {int(name[6:8]) for name in globals() if name.startswith("test_s")}
    assert numbers == set(range(1, 27))
