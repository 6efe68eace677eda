"""Selectors: what each form matches, and that none is ever ignored."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny as models
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import TargetError
from trimtab.models.families import ROLES


def select(model: nn.Module, targets: str | Sequence[str], *exclude: str, **options) -> list[str]:
    return anatomy_of(model).select(targets, exclude, **options)


def ends(paths: Sequence[str], parts: int = 1) -> set[str]:
    """The different ends of the paths."""
    return {".".join(path.split(".")[-parts:]) for path in paths}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return models.llama()


# -- forms --------------------------------------------------------------------------------------------


def test_a_name_matches_the_end_of_paths(llama: nn.Module) -> None:
    assert select(llama, "q_proj") == [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]


def test_a_name_of_several_segments(llama: nn.Module) -> None:
    assert select(llama, "layers.1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]


def test_names_match_whole_segments_only(llama: nn.Module) -> None:
    """S3: ``norm`` is the final norm, not every ``input_layernorm``; ``proj`` is no module at all."""
    assert select(llama, "norm") == ["model.norm"]
    with pytest.raises(TargetError, match="'proj' matches no module"):
        select(llama, "proj")
    adapter = tt.attach(models.llama(), tt.LoRA(targets="q_proj", train=("norm",)))
    assert [site.path for site in adapter.sites if site.method == 1] == ["model.norm"]


def test_a_glob_star_stays_within_a_segment(llama: nn.Module) -> None:
    assert select(llama, "model.layers.0.mlp.*_proj") == [
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    with pytest.raises(TargetError, match="matches no module"):
        select(llama, "model.*_proj")


def test_a_glob_of_two_stars_crosses_segments(llama: nn.Module) -> None:
    assert len(select(llama, "**.mlp.*_proj")) == 9
    assert select(llama, "**.layers.?.self_attn.v_proj") == select(llama, "v_proj")


def test_a_regular_expression_covers_the_whole_path(llama: nn.Module) -> None:
    assert select(llama, r"re:.*layers\.[02].*\.(q|v)_proj") == [
        f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 2) for p in "qv"
    ]
    with pytest.raises(TargetError, match="matches no module"):
        select(llama, "re:q_proj")
    with pytest.raises(TargetError, match="is not a regular expression"):
        select(llama, "re:(q_proj")


def test_several_selectors_are_a_union_in_model_order(llama: nn.Module) -> None:
    assert select(llama, ["v_proj", "q_proj"]) == select(llama, ["re:.*q_proj", "v_proj", "q_proj"])
    assert ends(select(llama, ["v_proj", "q_proj"])[:2]) == {"q_proj", "v_proj"}


# -- roles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("queries", {"q_proj"}),
        ("keys", {"k_proj"}),
        ("values", {"v_proj"}),
        ("attention_output", {"o_proj"}),
        ("mlp_output", {"mlp"}),
        ("mlp_down", {"down_proj"}),
        ("embeddings", {"embed_tokens"}),
        ("self_attention", {"self_attn"}),
        ("norms", {"input_layernorm", "post_attention_layernorm", "norm"}),
        ("head", {"lm_head"}),
    ],
)  # fmt: skip
def test_roles_of_a_decoder(llama: nn.Module, role: str, expected: set[str]) -> None:
    assert ends(select(llama, role)) == expected


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("all-linear", {"c_attn", "c_proj", "c_fc"}),
        ("attention", {"c_attn", "c_proj"}),
        ("fused_qkv", {"c_attn"}),
        ("embeddings", {"wte", "wpe"}),
        ("norms", {"ln_1", "ln_2", "ln_f"}),
    ],
)
def test_roles_of_a_decoder_with_a_fused_layer(role: str, expected: set[str]) -> None:
    assert ends(select(models.gpt2(), role)) == expected


def test_roles_of_an_encoder_with_a_classification_head() -> None:
    bert = models.bert()
    assert select(bert, "head") == ["classifier"]
    assert ends(select(bert, "keys"), 2) == {"self.key"}
    assert not any("classifier" in path for path in select(bert, "all-linear"))
    assert ends(select(bert, "mlp"), 2) == {"intermediate.dense", "output.dense"}


def test_roles_of_an_encoder_decoder_reach_both_stacks() -> None:
    keys = select(models.t5(), "keys")
    assert [path.split(".")[0] for path in keys] == ["encoder"] * 2 + ["decoder"] * 4


@pytest.mark.parametrize("name", [n for n, case in models.CASES.items() if case.blocks])
def test_every_role_names_modules_that_are_called(name: str) -> None:
    """An encoder-decoder's ``shared`` embedding only lends its weight to those that are called."""
    model = models.CASES[name].make()
    for role in ROLES:
        if role == "all" and name in models.STORED:
            continue  # what is trained in full cannot be in few bits
        if found := anatomy_of(model).role(role):
            kind = {"norms": tt.BitFit, "mlp_norm": tt.BitFit, "all": tt.Full}.get(role)
            method = kind(targets=role) if kind else tt.Bottleneck(size=1, targets=role)
            tt.attach(model, method, "here")
            reached = tt.probe(model, **models.CASES[name].inputs())
            assert reached == [], f"{role}: {found}"
            tt.detach(model, "here")


def test_a_role_that_a_model_lacks_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(
        TargetError, match="'fused_qkv': LlamaForCausalLM has no module in that role"
    ):
        select(llama, "fused_qkv")


def test_a_module_that_is_called_like_a_role_can_be_named() -> None:
    """Where no module has the role, the word is a name like any other."""
    model = nn.ModuleDict(
        {"tower": nn.ModuleDict({"norms": nn.Linear(4, 4), "head": nn.Linear(4, 2)})}
    )
    assert select(model, "norms") == ["tower.norms"]
    assert select(model, "head") == ["tower.head"]


def test_expert_parameters_are_linear_layers() -> None:
    mixtral = models.mixtral()
    found = [path for path in select(mixtral, "all-linear") if "experts" in path]
    assert found == [
        f"model.layers.{n}.mlp.experts.{name}"
        for n in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    ]
    assert select(mixtral, "gate_up_proj") == [
        path for path in found if path.endswith("gate_up_proj")
    ]
    assert select(mixtral, "mlp_down") == [path for path in found if path.endswith("down_proj")]
    assert select(mixtral, "**.experts.*_proj") == select(mixtral, r"re:.*\.experts\..*_proj")
    assert not any("experts" in path for path in select(mixtral, "all-linear", "**.experts.*"))


# -- nothing is ignored -------------------------------------------------------------------------------


def test_each_selector_must_match(llama: nn.Module) -> None:
    """S1: one good selector does not hide a misspelt one."""
    with pytest.raises(TargetError, match=r"'v_prj' matches no module .*'v_proj'"):
        select(llama, ["q_proj", "v_prj"])


def test_a_misspelt_role_suggests_the_role(llama: nn.Module) -> None:
    with pytest.raises(TargetError, match="'all-linear'"):
        select(llama, "all-liner")


def test_a_misspelt_module_to_train_is_an_error() -> None:
    """S2."""
    model = models.llama()
    with pytest.raises(TargetError, match=r"'lm_haed' matches no module .*'lm_head'"):
        tt.attach(model, tt.LoRA(train=("lm_haed",)))
    assert tt.describe(model).endswith("no adapters attached")


def test_a_module_cannot_be_adapted_and_trained_in_full() -> None:
    with pytest.raises(TargetError, match=r"q_proj' is both adapted and trained in full"):
        tt.attach(models.llama(), tt.LoRA(targets="attention", train=("q_proj",)))


def test_an_exclusion_takes_out(llama: nn.Module) -> None:
    assert ends(select(llama, "attention", "o_proj")) == {"q_proj", "k_proj", "v_proj"}
    assert ends(select(llama, "all-linear", "mlp")) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(select(llama, "q_proj", "model.layers.0.self_attn.q_proj")) == 2


def test_an_exclusion_that_excludes_nothing_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(TargetError, match="exclude 'lm_head' excludes none"):
        select(llama, "all-linear", "lm_head")
    with pytest.raises(TargetError, match="'o_prj' matches no module"):
        select(llama, "all-linear", "o_prj")


def test_exclusions_may_overlap(llama: nn.Module) -> None:
    assert select(llama, "all-linear", "mlp", "down_proj") == select(llama, "attention")


def test_nothing_left_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(TargetError, match="leave no module"):
        select(llama, "attention", "attention")
    with pytest.raises(TargetError, match="no targets"):
        select(llama, [])


# -- layers -------------------------------------------------------------------------------------------


def test_layers_restrict_to_blocks(llama: nn.Module) -> None:
    assert select(llama, "q_proj", layers=(0, 2)) == [
        f"model.layers.{n}.self_attn.q_proj" for n in (0, 2)
    ]


def test_negative_layers_count_from_the_end(llama: nn.Module) -> None:
    assert select(llama, "q_proj", layers=(-1,)) == ["model.layers.2.self_attn.q_proj"]


def test_layers_may_be_a_range() -> None:
    adapter = tt.attach(models.llama(), tt.LoRA(targets="q_proj", layers=range(1, 3)))
    assert [site.path.split(".")[2] for site in adapter.sites] == ["1", "2"]


def test_layers_out_of_range_are_an_error(llama: nn.Module) -> None:
    """S4."""
    with pytest.raises(TargetError, match=r"layers \[7\] do not exist: .* blocks 0 to 2"):
        select(llama, "q_proj", layers=(0, 7))
    with pytest.raises(TargetError, match=r"layers \[-4\]"):
        select(llama, "q_proj", layers=(-4,))


def test_layers_of_a_model_without_blocks_are_an_error() -> None:
    with pytest.raises(TargetError, match="Mixed has no transformer blocks"):
        select(models.mixed(), "head", layers=(0,))


def test_layers_outside_the_selection_are_an_error(llama: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"no selected module lies in layers \[1\]"):
        select(llama, ["lm_head", "layers.0.self_attn.q_proj"], layers=(1,))


def test_a_pattern_that_matches_no_target_is_an_error() -> None:
    with pytest.raises(TargetError, match="pattern 'k_proj' matches none of the 3 targets"):
        tt.attach(models.llama(), tt.LoRA(targets="q_proj", rank_pattern={"k_proj": 2}))


# -- the plan -----------------------------------------------------------------------------------------


def test_the_plan_can_be_read_before_anything_is_attached() -> None:
    model = models.llama()
    text = tt.resolve(model, tt.LoRA(rank=4, targets=("q_proj", "k_proj"), train=("lm_head",)))
    lora = 3 * (4 * (32 + 32) + 4 * (32 + 16))
    assert text.splitlines() == [
        f"lora: 7 sites, {lora + 97 * 32:,} parameters",
        "     3 × model.layers.*.self_attn.q_proj",
        "     3 × model.layers.*.self_attn.k_proj",
        "     1 × lm_head",
    ]
    assert all(p.requires_grad for p in model.parameters())
    assert tt.attach(model, "lora(rank=4, targets=['q_proj', 'k_proj'])").count == lora


def test_the_plan_says_in_which_role() -> None:
    lines = tt.resolve(models.llama(), "ia3").splitlines()
    assert "     3 × model.layers.*.mlp.down_proj [in]" in lines


# -- shared modules -----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One linear layer under two parents."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(4, 4)
        self.first = nn.ModuleDict({"proj": inner})
        self.second = nn.ModuleDict({"proj": inner})
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second["proj"](self.first["proj"](x)))


def test_a_shared_module_is_one_site_that_acts_wherever_it_is_called() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 4)
    before, state = model(x), model.state_dict()
    adapter = tt.attach(model, "lora(rank=2, targets='proj')")
    assert [site.path for site in adapter.sites] == ["first.proj"]
    assert model.first["proj"] is model.second["proj"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    delta = (
        adapter.tensors["first.proj.lora_B.weight"] @ adapter.tensors["first.proj.lora_A.weight"]
    )
    shared = model.first["proj"].base_layer
    weight = shared.weight + 16 * delta
    once = x @ weight.T + shared.bias
    expected = model.other(once @ weight.T + shared.bias)
    assert torch.allclose(model(x), expected, atol=1e-5)
    merged = tt.merge(model, "default")
    assert merged.first["proj"] is merged.second["proj"]
    assert torch.allclose(merged(x), expected, atol=1e-4)
    assert state.keys() <= model.state_dict().keys()
    tt.detach(model, "default")
    assert torch.equal(model(x), before) and model.first["proj"] is model.second["proj"]


def test_a_shared_module_can_be_named_by_any_of_its_paths() -> None:
    model = Twice()
    assert select(model, "second.proj") == ["first.proj"]
    assert select(model, ["first.proj", "second.proj"]) == ["first.proj"]
    assert select(model, ["proj", "other"], "second.proj") == ["other"]


def test_tied_weights_of_two_modules_are_two_sites() -> None:
    model = models.llama(tie_word_embeddings=True)
    adapter = tt.attach(model, tt.LoRA(rank=2, targets=("embed_tokens", "lm_head")))
    assert [site.path for site in adapter.sites] == ["model.embed_tokens", "lm_head"]
