"""Configurations: PEFT's fields and defaults, files both ways, typed errors, and what each means as a method."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import trimtab as tt
import trimtab.peft as ours
from tests import tiny
from trimtab.errors import (
    ConfigError,
    TargetError,
    TrimtabError,
    UnknownNameError,
    UnsupportedError,
)
from trimtab.peft.config import CONFIGS
from trimtab.peft.configs.ours import Ours

SHARED = sorted(name for name in ours.__all__ if name.endswith("Config") and hasattr(peft, name))
NEEDED: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"total_step": 20},
    "TrainableTokensConfig": {"token_indices": [3]},
    "PrefixTuningConfig": {"num_virtual_tokens": 4},
    "PromptTuningConfig": {"num_virtual_tokens": 4},
    "PromptEncoderConfig": {"num_virtual_tokens": 4},
    "AdaptionPromptConfig": {"adapter_len": 4, "adapter_layers": 1},
    "UnionConfig": {"parts": "lora(rank=4)|bitfit"},
}
"""What a configuration cannot do without."""


def made(name: str, package: Any = ours, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(package, name)(**NEEDED.get(name, {}), **options)


def their_model(model: nn.Module, config: Any) -> Any:
    """PEFT's own, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def defaults(cls: type) -> dict[str, str]:
    """Fields and defaults as text, without what says the class."""
    found = {}
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        value = field.default if factory is dataclasses.MISSING else factory()
        found[field.name] = value if isinstance(value, str) else repr(value)
    found.pop("peft_type", None)
    return found


# -- fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_fields_defaults_and_kin_are_those_of_peft(name: str) -> None:
    mine, theirs = getattr(ours, name), getattr(peft, name)
    assert defaults(mine) == defaults(theirs)
    assert issubclass(mine, theirs)


def test_they_are_our_own_and_the_same_without_peft() -> None:
    """Nothing is inherited: where ``peft`` cannot be imported, each has all its fields."""
    code = (
        "import sys, json, dataclasses; sys.modules['peft'] = None\n"
        "import trimtab.peft as ours\n"
        f"print(json.dumps({{n: sorted(f.name for f in dataclasses.fields(getattr(ours, n))) for n in {SHARED} }}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone = json.loads(out.stdout.splitlines()[-1])
    for name in SHARED:
        assert alone[name] == sorted(defaults(getattr(ours, name))), name


@pytest.mark.parametrize("name", sorted({cls.__name__ for cls in CONFIGS.values()}))
def test_signature_and_text_say_each_option(name: str) -> None:
    cls = getattr(ours, name)
    fields = [field.name for field in dataclasses.fields(cls)]
    assert set(inspect.signature(cls).parameters) == set(fields)
    lines = cls.__doc__.partition("Options:\n")[2].splitlines()
    said = dict(line.strip().split(": ", 1) for line in lines)
    assert list(said) == fields and all(len(text) > 5 for text in said.values())
    assert cls.__doc__.partition("\n")[0].endswith(".")


@pytest.mark.parametrize("name", sorted({cls.__name__ for cls in CONFIGS.values()}))
def test_unknown_options_are_errors_with_a_suggestion(name: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"{name} has no option 'task_typ'.*'task_type'"):
        made(name, task_typ="CAUSAL_LM")
    with pytest.raises(ConfigError, match="CAUSAL_LM"):
        made(name, task_type="CAUSAL_LN")


def test_a_misspelt_alpha_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'lora_alpha'"):
        ours.LoraConfig(lora_alpa=3)
    with pytest.raises(UnknownNameError, match="Did you mean 'target_modules'"):
        ours.BottleneckConfig(target_module=["mlp"])


def test_the_type_may_be_said_as_in_the_documentation_of_peft() -> None:
    said = {"peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 20, "token_dim": 32,
            "num_transformer_submodules": 1, "num_attention_heads": 4, "num_layers": 2,
            "encoder_hidden_size": 12}  # fmt: skip
    config = ours.get_peft_config(said)
    assert config == ours.PrefixTuningConfig(**said)
    assert ours.get_peft_model(tiny.t5(), config).get_nb_trainable_parameters()[0] > 0
    assert ours.LoraConfig(peft_type=peft.PeftType.LORA.value) == ours.LoraConfig()
    with pytest.raises(ConfigError, match="LoraConfig is of type LORA, not 'IA3'"):
        ours.LoraConfig(peft_type="IA3")
    with pytest.raises(ConfigError, match="num_layers=24, but the model has 2"):
        ours.get_peft_model(tiny.t5(), ours.get_peft_config({**said, "num_layers": 24}))


@pytest.mark.parametrize("name", sorted({cls.__name__ for cls in CONFIGS.values()}))
def test_they_are_values(name: str) -> None:
    """Equal, copied, pickled and changed as dataclasses are."""
    config = made(name, task_type="CAUSAL_LM")
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, revision="main") != config


# -- values that do not fit ---------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("LoraConfig", {"r": 0}, ConfigError, "r must be a whole number from 1"),
    ("LoraConfig", {"r": 2.5}, ConfigError, "r must be a whole number"),
    ("LoraConfig", {"lora_dropout": 1.5}, ConfigError, "lora_dropout must lie from 0"),
    ("LoraConfig", {"bias": "lora"}, ConfigError, "'lora_only'"),
    ("LoraConfig", {"target_modules": 3}, ConfigError, "target_modules must be a list"),
    ("LoraConfig", {"modules_to_save": "score"}, ConfigError, r"write \['score'\]"),
    ("LoraConfig", {"layers_pattern": "h"}, ConfigError, "give both"),
    ("LoraConfig", {"init_lora_weights": "pisa"}, UnknownNameError, "'pissa'"),
    ("LoraConfig", {"use_dora": True, "kasa_config": {}}, ConfigError, "do not go together"),
    ("LoraConfig", {"use_dora": True, "use_qalora": True}, ConfigError, "use_dora and use_qalora do not go together"),
    ("LoraConfig", {"kasa_config": {"beta": 1.0}, "init_lora_weights": "mica"}, ConfigError, "do not go together"),
    ("LoraConfig", {"use_dora": True, "alora_invocation_tokens": [3]}, ConfigError, "do not go together"),
    ("LoraConfig", {"velora_config": {"groups": 3}}, UnknownNameError, "num_groups"),
    ("AdaLoraConfig", {"kasa_config": {"beta": 1.0}}, UnsupportedError, "another method"),
    ("AdaLoraConfig", {"lora_bias": True}, UnsupportedError, "lora_only"),
    ("AdaLoraConfig", {"layer_replication": [(0, 2), (1, 3)]}, UnsupportedError, "LoraConfig has it"),
    ("AdaLoraConfig", {"alora_invocation_tokens": [3]}, UnsupportedError, "LoraConfig has it"),
    ("LoraConfig", {"megatron_config": {"a": 1}}, UnsupportedError, "Megatron"),
    ("AdaLoraConfig", {"ensure_weight_tying": True}, UnsupportedError, "tied"),
    ("AdaLoraConfig", {"tinit": 15, "tfinal": 10}, ConfigError, "leave none of 20 steps"),
    ("AdaLoraConfig", {"target_r": 30}, ConfigError, "cannot be more"),
    ("AdaLoraConfig", {"use_dora": True}, UnsupportedError, "no magnitudes"),
    ("AdaLoraConfig", {"init_lora_weights": "pissa"}, ConfigError, "its own way"),
    ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}, ConfigError, "lack"),
    ("OFTConfig", {"r": 4}, ConfigError, "either r"),
    ("OFTConfig", {"coft": True, "eps": 0.0}, ConfigError, "eps must be above 0"),
    ("OFTConfig", {"num_cayley_neumann_terms": 1}, ConfigError, "does not turn anything"),
    ("OFTConfig", {"module_dropout": 1.0}, ConfigError, "module_dropout must lie"),
    ("OFTConfig", {"bias": "some"}, ConfigError, "must be none, all"),
    ("BOFTConfig", {"boft_block_num": 4}, ConfigError, "either boft_block_num"),
    ("BOFTConfig", {"bias": "some"}, ConfigError, "must be none, all"),
    ("LoKrConfig", {"init_weights": "lycori"}, ConfigError, "'lycoris'"),
    ("MissConfig", {"init_weights": "bats"}, ConfigError, "'bat'"),
    ("RandLoraConfig", {"randlora_dropout": -0.1}, ConfigError, "randlora_dropout must lie"),
    ("ShiraConfig", {"mask_type": "magnitude"}, ConfigError, "UnionConfig"),
    ("FourierFTConfig", {"n_frequency": 0}, ConfigError, "n_frequency must"),
    ("TrainableTokensConfig", {}, ConfigError, ""),
    ("PromptTuningConfig", {"prompt_tuning_init": "TEXT"}, ConfigError, "tokenizer_name_or_path"),
    ("PromptTuningConfig", {"prompt_tuning_init": "RANDON"}, ConfigError, "'RANDOM'"),
    ("PromptEncoderConfig", {"encoder_reparameterization_type": "GRU"}, ConfigError, "MLP, LSTM"),
    ("PrefixTuningConfig", {"init_weights": "zeros"}, ConfigError, "'zero'"),
    ("SpotTuneConfig", {"hidden": 0}, ConfigError, "hidden"),
    ("UnionConfig", {"modules_to_save": "score"}, ConfigError, ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "kind", "text"), [w for w in WRONG if w[3]])
def test_values_that_do_not_fit_are_typed_errors(
    name: str, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        made(name, **options)
    later = made(name)  # set afterwards, they are refused when the adapter is made
    for option, value in options.items():
        setattr(later, option, value)
    with pytest.raises(TrimtabError):
        ours.get_peft_model(tiny.llama(), later)


def test_adalora_needs_its_number_of_steps() -> None:
    with pytest.raises(ConfigError, match="total_step"):
        ours.AdaLoraConfig(init_r=4)
    with pytest.warns(UserWarning, match="r has no effect in AdaLoRA; the first rank is init_r"):
        ours.AdaLoraConfig(r=4, total_step=10)


def test_names_that_match_nothing_are_errors() -> None:
    """Silent in PEFT: all of these but the last name one module that is there."""
    for options, text in (
        ({"target_modules": ["q_proj", "v_prj"]}, "Did you mean 'v_proj'"),
        ({"modules_to_save": ["lm_haed"]}, "Did you mean 'lm_head'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, "Did you mean 'k_proj'"),
        ({"layers_to_transform": [0, 7]}, r"layers \[7\]; targets lie in \[0, 1, 2\]"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "behind"),
        ({"rank_pattern": {"k_proj": 2}}, "matches none"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "three dimensions"),
        ({"target_modules": r".*\.w"}, "matches no module"),
    ):
        with pytest.raises(TargetError, match=text):
            ours.get_peft_model(tiny.llama(), ours.LoraConfig(**options))


def test_an_exclusion_that_meets_no_target_is_no_mistake() -> None:
    """The module is there, and nothing targets it."""
    config = ours.LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"])
    model = ours.get_peft_model(tiny.llama(), config)
    assert len(model.base_model.adapters["default"].sites) == 21


def test_a_configuration_of_another_package_is_refused() -> None:
    with pytest.raises(ConfigError, match="of another package"):
        ours.get_peft_model(tiny.llama(), peft.LoraConfig())


@pytest.mark.parametrize("name", sorted({cls.__name__ for cls in CONFIGS.values()}))
def test_the_users_configuration_is_left_as_it_is(name: str) -> None:
    options = (
        {"inner": "lora(rank=4)"}
        if name in ("SpotTuneConfig", "AdaFitConfig", "GatedConfig")
        else {}
    )
    options |= {"target_modules": ["lm_head"]} if name == "FullConfig" else {}
    options |= {"n": 2, "reduction": 4} if name == "CompacterConfig" else {}
    options |= {"r": 4} if name in ("MissConfig", "RandLoraConfig", "ShiraConfig") else {}
    options |= {"oft_block_size": 8} if name == "OFTConfig" else {}
    options |= {"n_frequency": 50} if name == "FourierFTConfig" else {}
    config = made(name, **options)
    before = config.to_dict()
    model = ours.get_peft_model(tiny.llama(), config)
    assert config.to_dict() == before
    assert model.peft_config["default"] is not config
    assert model.get_nb_trainable_parameters()[0] > 0


# -- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in SHARED if name in {c.__name__ for c in CONFIGS.values()}]
)
def test_files_of_configurations_both_ways(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    named = "target_modules" in defaults(getattr(ours, name)) and name != "AdaptionPromptConfig"
    options |= {"target_modules": ["v_proj", "q_proj"]} if named else {}
    options |= (
        {"exclude_modules": ["lm_head"]}
        if "exclude_modules" in defaults(getattr(ours, name))
        else {}
    )
    mine, theirs = made(name, **options), made(name, peft, **options)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    for read in (ours.PeftConfig, getattr(ours, name)):
        again = read.from_pretrained(tmp_path / "mine")
        assert type(again) is type(mine)
        back = read.from_pretrained(tmp_path / "theirs")
        assert _plain(back) == _plain(again) == _plain(mine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_by_peft = peft.PeftConfig.from_pretrained(tmp_path / "mine")
    assert type(read_by_peft) is getattr(peft, name)
    assert _plain(read_by_peft) == _plain(theirs)


def _plain(config: Any) -> dict[str, Any]:
    found = {k: sorted(v) if isinstance(v, set | list) else v for k, v in config.to_dict().items()}
    return {k: v for k, v in found.items() if k not in ("peft_version", "peft_type")} | {
        "peft_type": str(getattr(found["peft_type"], "value", found["peft_type"]))
    }


def test_nested_options_survive_a_file(tmp_path: Path) -> None:
    config = ours.LoraConfig(
        init_lora_weights="eva", eva_config=ours.EvaConfig(rho=1.5), rank_pattern={"q_proj": 2},
        target_modules={"v_proj", "q_proj"}, runtime_config=ours.LoraRuntimeConfig(),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = ours.LoraConfig.from_pretrained(tmp_path)
    assert again.eva_config == ours.EvaConfig(rho=1.5) and again.rank_pattern == {"q_proj": 2}
    assert again.target_modules == ["q_proj", "v_proj"]
    assert "runtime_config" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_an_option_that_no_release_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "use_flora": true}'
    )
    with pytest.raises(UnknownNameError, match="use_flora"):
        ours.PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORRA", "r": 4}')
    with pytest.raises(UnknownNameError, match="Did you mean 'LORA'"):
        ours.PeftConfig.from_pretrained(tmp_path)


OWN: list[tuple[str, dict[str, Any]]] = [
    ("BottleneckConfig", {"size": 8}),
    ("PfeifferConfig", {"reduction": 4}),
    ("ParallelConfig", {"reduction": 4, "scaling": "learned"}),
    ("AdapterPlusConfig", {"reduction": 4}),
    ("CompacterConfig", {"n": 2, "reduction": 4}),
    ("BitFitConfig", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("PiggybackConfig", {"target_modules": ["q_proj"], "threshold": 0.004}),
    ("SpotTuneConfig", {"inner": "lora(rank=2)", "hidden": 8}),
    ("AdaFitConfig", {"inner": tt.LoRA(rank=2), "group_size": 8}),
    ("LoReftConfig", {"rank": 2}),
    ("DiReftConfig", {"rank": 2}),
    ("NoReftConfig", {"rank": 2}),
    ("MoraConfig", {"rank": 2, "exclude_modules": ["lm_head"]}),
    ("DiffPruningConfig", {"target_modules": ["q_proj"], "keep": 0.1}),
    ("GatedConfig", {"inner": "lora(rank=2)"}),
    ("FullConfig", {"target_modules": ["lm_head"]}),
    ("UnionConfig", {"parts": "lora(rank=2)|prefix(length=3)"}),
    ("UnionConfig", {"parts": [tt.LoRA(rank=2), "bitfit"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("name", "options"), OWN)
def test_our_own_methods_train_save_and_load(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = ours.get_peft_model(tiny.llama(), getattr(ours, name)(**options, task_type="CAUSAL_LM"))
    ids = {"input_ids": torch.arange(3, 15)[None], "labels": torch.arange(3, 15)[None]}
    model(**ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None for p in trained)
    model.save_pretrained(tmp_path)
    config = ours.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, getattr(ours, name))
    fields = set(options) - {
        "inner",
        "parts",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    }
    assert all(getattr(config, key) == options[key] for key in fields)
    again = ours.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert type(again) is ours.PeftModelForCausalLM
    assert type(again.peft_config["default"]) is type(config)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**ids).logits, model.eval()(**ids).logits)
    fresh = ours.get_peft_model(tiny.llama(), config)  # what was read makes the same adapter anew
    wanted = model.base_model.adapters["default"]
    assert fresh.base_model.adapters["default"].named().keys() == wanted.named().keys()


def test_our_own_methods_act_where_they_know_to_and_less() -> None:
    def paths(config: Any) -> list[str]:
        model = ours.get_peft_model(tiny.llama(), config)
        return [site.path for site in model.base_model.adapters["default"].sites]

    whole = paths(ours.MoraConfig(rank=2))
    assert len(whole) == 21
    narrow = paths(ours.MoraConfig(rank=2, exclude_modules=r".*mlp.*", layers_to_transform=[1, 2]))
    assert narrow == [path for path in whole if "mlp" not in path and "layers.0" not in path]
    assert paths(ours.MoraConfig(rank=2, exclude_modules=["mlp.up_proj"])) == [
        p for p in whole if "up_proj" not in p
    ]
    assert paths(ours.AdapterPlusConfig(reduction=8, layers_to_transform=2)) == ["model.layers.2"]
    assert len(paths(ours.BitFitConfig(layers_to_transform=[0]))) == 7
    assert paths(ours.BottleneckConfig(target_modules=["mlp_output"], layers_to_transform=[0])) == [
        "model.layers.0.mlp"
    ]


def test_forms_that_peft_does_not_read_come_back_as_their_configuration(tmp_path: Path) -> None:
    for number, config in enumerate((
        ours.LoraConfig(r=2, init_lora_weights="pissa"),
        ours.LoraConfig(r=2, init_lora_weights="pissa_niter_2"),
        ours.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"),
        ours.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        ours.get_peft_model(tiny.llama(), config).save_pretrained(folder)
        again = ours.PeftConfig.from_pretrained(folder)
        assert type(again) is type(config)
        for name in ("r", "init_lora_weights", "num_virtual_tokens", "encoder_hidden_size", "prefix_projection",
                     "encoder_reparameterization_type"):  # fmt: skip
            assert getattr(again, name, None) == getattr(config, name, None), name


# -- what they mean -----------------------------------------------------------------------------------


def method(config: Any, model: nn.Module | None = None) -> Any:
    return config.method(model or tiny.llama())


def test_lora_options_mean_these_methods() -> None:
    found = method(
        ours.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, use_rslora=True, bias="lora_only")
    )
    assert (found.rank, found.alpha, found.dropout, found.rslora, found.bias) == (
        4,
        16.0,
        0.1,
        True,
        "lora_only",
    )
    assert found.kind == "lora" and method(ours.LoraConfig(use_dora=True)).kind == "dora"
    for init in ("gaussian", "orthogonal", "pissa", "olora", "pissa_niter_4"):
        assert method(ours.LoraConfig(init_lora_weights=init)).init == init
    eva = ours.LoraConfig(init_lora_weights="eva", eva_config={"rho": 1.0})
    with pytest.warns(UserWarning, match="call initialize_lora_eva_weights"):
        assert method(eva).init == "default"
    eva.batches = []
    assert method(eva).init == "eva(rho=1.0, tau=0.99)"
    with pytest.raises(ConfigError, match="call preprocess_loraga"):
        method(ours.LoraConfig(init_lora_weights="lora_ga"))


def test_experts_are_targets_by_the_names_of_their_parameters() -> None:
    config = ours.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    mine = ours.get_peft_model(tiny.mixtral(), config)
    options = {"r": 2, "target_modules": ["q_proj"], "target_parameters": config.target_parameters}
    theirs = their_model(tiny.mixtral(), peft.LoraConfig(**options))
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    only = ours.LoraConfig(target_parameters=["experts.down_proj"])
    assert len(ours.get_peft_model(tiny.mixtral(), only).base_model.adapters["default"].sites) == 2
    with pytest.raises(TargetError, match="Did you mean 'experts.down_proj'"):
        method(ours.LoraConfig(target_parameters=["experts.down_prj"]), tiny.mixtral())
    every = method(ours.LoraConfig(target_modules="all-linear"), tiny.mixtral())
    assert not any(
        "experts" in target for target in every.targets
    )  # as PEFT's, which has no layers there


def test_tokens_beside_a_lora_are_a_union(tmp_path: Path) -> None:
    model = tiny.llama()
    config = ours.LoraConfig(r=2, trainable_token_indices=[5, 7])
    mine = ours.get_peft_model(model, config)
    assert mine.base_model.adapters["default"].method.kind == "union"
    theirs = their_model(tiny.llama(), peft.LoraConfig(r=2, trainable_token_indices=[5, 7]))
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    named = ours.LoraConfig(r=2, trainable_token_indices={"embed_tokens": [5], "lm_head": [5, 6]})
    assert len(method(named).members) == 3
    mine.save_pretrained(tmp_path)
    again = ours.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is ours.LoraConfig and again.r == 2
    assert again.trainable_token_indices == {"model.embed_tokens": [5, 7]}
    assert again.method(tiny.llama()) == config.method(tiny.llama())
    tied = method(config, tiny.llama(tie_word_embeddings=True)).members[1]
    assert dict(tied)["tie"] and not dict(config.method(model).members[1])["tie"]


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 6, 12), generator=generator)
    return [
        {"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids
    ]


def test_eva_begins_as_in_peft() -> None:
    """One batch, seen again, and as many components as could be, so that both are exact."""
    data = batches()[:1]
    options = {"r": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "eva"}
    with pytest.warns(UserWarning, match="begins without data"):
        mine = ours.get_peft_model(tiny.llama(), ours.LoraConfig(**options))
    ours.initialize_lora_eva_weights(mine, data)
    theirs = their_model(tiny.llama(), peft.LoraConfig(**options, eva_config=peft.EvaConfig()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    left, right = dict(mine.named_parameters()), dict(theirs.named_parameters())
    found = [name for name, p in right.items() if p.requires_grad]
    assert [name for name, p in left.items() if p.requires_grad] == found
    for name in found:
        torch.testing.assert_close(
            left[name].abs(), right[name].abs(), atol=1e-3, rtol=1e-2, msg=name
        )
    config = mine.peft_config["default"]
    assert config.rank_pattern and config.batches is None
    with pytest.raises(ConfigError, match="is not of init_lora_weights='eva'"):
        ours.initialize_lora_eva_weights(
            ours.get_peft_model(tiny.llama(), ours.LoraConfig()), batches()
        )


def test_lora_ga_begins_as_in_peft() -> None:
    """The same product of factors at first: the directions of the gradient, at PEFT's scale."""
    from peft.tuners.lora import preprocess_loraga

    options = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "lora_ga"}
    models, configs = [], []
    for package, before in ((ours, ours.preprocess_loraga), (peft, preprocess_loraga)):
        model = tiny.llama()

        def train_step(model: Any = model) -> None:
            for batch in batches():
                model(**batch).loss.backward()

        config = package.LoraConfig(**options, lora_ga_config=package.LoraGAConfig())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before(model, config, train_step)
            models.append(package.get_peft_model(model, config))
        configs.append(config)
    products = []
    for model in models:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        firsts = [name for name in named if "lora_A" in name]
        products.append([named[n.replace("lora_A", "lora_B")] @ named[n] for n in firsts])
    for one, other in zip(*products, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=2e-2)
    assert all(p.grad is None for p in models[0].get_base_model().parameters())


AT_RANDOM: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"init_lora_weights": False}),
    ("AdaLoraConfig", {"init_lora_weights": False}),
    ("IA3Config", {"init_ia3_weights": False}),
    ("LoHaConfig", {"init_weights": False}),
    ("LoKrConfig", {"init_weights": False}),
    ("OFTConfig", {"init_weights": False, "oft_block_size": 8}),
    ("BOFTConfig", {"init_weights": False}),
    ("VeraConfig", {"init_weights": False}),
    ("FourierFTConfig", {"init_weights": False, "n_frequency": 50}),
    ("HRAConfig", {"init_weights": False}),
    ("MissConfig", {"init_weights": False, "r": 8}),
    ("RandLoraConfig", {"init_weights": False, "r": 4}),
    ("ShiraConfig", {"init_weights": False, "r": 4}),
    ("HiraConfig", {"init_weights": False, "r": 4}),
    ("TrainableTokensConfig", {"init_weights": False}),
]


@pytest.mark.parametrize(("name", "options"), AT_RANDOM)
def test_without_init_weights_an_adapter_begins_at_random(
    name: str, options: dict[str, Any]
) -> None:
    """As spread as PEFT's own first values; with init_weights it begins as the base does."""
    ids = torch.arange(2, 20)[None]
    base = tiny.llama()
    with torch.no_grad():
        plain = base(ids).logits
        torch.manual_seed(3)
        mine = ours.get_peft_model(base, made(name, **options)).eval()
        assert not torch.allclose(mine(ids).logits, plain, atol=1e-5)
        same = options | {
            key: name != "FourierFTConfig" or True for key in options if "init" in key
        }
        kept = ours.get_peft_model(tiny.llama(), made(name, **same)).eval()
        assert torch.allclose(kept(ids).logits, plain, atol=1e-5)
    theirs = their_model(tiny.llama(), made(name, peft, **options))
    for (one, a), (other, b) in zip(_firsts(mine), _firsts(theirs), strict=True):
        assert one == other
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.35, abs=0.02), one
        assert float(a.mean()) == pytest.approx(float(b.mean()), abs=0.4), one


def _firsts(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The values of each slot over all sites, flat."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad and p.numel() > 1:
            found.setdefault(name.partition("proj.")[2], []).append(p.detach().flatten())
    return [(slot, torch.cat(values)) for slot, values in sorted(found.items())]


def test_prompts_begin_as_they_are_told(tmp_path: Path) -> None:
    table = tiny.llama().get_input_embeddings().weight.detach()

    def first(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        config = ours.PromptTuningConfig(num_virtual_tokens=50, task_type="CAUSAL_LM", **options)
        (p,) = [
            p for p in ours.get_peft_model(tiny.llama(), config).parameters() if p.requires_grad
        ]
        return p.detach()

    assert float(first().std()) == pytest.approx(1, rel=0.1)
    rows = first(prompt_tuning_init="SAMPLE_VOCAB")
    assert all(any(torch.equal(row, known) for known in table) for row in rows)
    _tokenizer(tmp_path)
    text = {"prompt_tuning_init_text": "one two three", "tokenizer_name_or_path": str(tmp_path)}
    rows = first(prompt_tuning_init="TEXT", **text)
    assert torch.equal(rows[:4], table[[3, 4, 5, 3]])
    prefix = ours.PrefixTuningConfig(
        num_virtual_tokens=3, init_weights="zero", prefix_projection=True
    )
    model = ours.get_peft_model(tiny.llama(), prefix)
    zero = [n for n, p in model.named_parameters() if p.requires_grad and not p.any()]
    assert len(zero) == 2 and all("transform.2" in name for name in zero)


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4, "three": 5}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>").save_pretrained(folder)


def test_ranks_of_adalora_are_shared_out_as_in_peft() -> None:
    """The same values at first, the same gradients: the same masks and ranks after every step, and in the config."""
    options = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8, "task_type": "CAUSAL_LM",
               "lora_alpha": 6}  # fmt: skip
    mine = ours.get_peft_model(tiny.llama(), ours.AdaLoraConfig(**options)).double()
    theirs = their_model(tiny.llama(), peft.AdaLoraConfig(**options)).double()
    left = dict(mine.named_parameters())
    right = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in right.items():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
            left[name].copy_(p)
    ids = {"input_ids": torch.arange(3, 27).view(2, 12), "labels": torch.arange(3, 27).view(2, 12)}
    for step in range(1, 9):
        losses = []
        for model, parameters in ((mine, [left[n] for n in right]), (theirs, list(right.values()))):
            optimiser = torch.optim.SGD(parameters, lr=0.1)
            loss = model.train()(**ids).loss
            loss.backward()
            optimiser.step()
            model.update_and_allocate(step)
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        # the loss that keeps components apart is in both; transformers rounds to fp32
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for name, p in right.items():
            torch.testing.assert_close(left[name], p, msg=f"{name} after step {step}")
    wanted = theirs.peft_config["default"].rank_pattern
    assert {k: sum(v) for k, v in mine.peft_config["default"].rank_pattern.items()} == {
        k.removesuffix(".default"): sum(v)
        for k, v in wanted.items()  # in a file, PEFT leaves the name out too
    }
    with pytest.raises(ConfigError, match="update_and_allocate is for AdaLoRA"):
        ours.get_peft_model(tiny.llama(), ours.LoraConfig()).update_and_allocate(1)


def test_losses_of_gates_are_in_the_loss_of_the_model() -> None:
    model = ours.get_peft_model(
        tiny.llama(), ours.SpotTuneConfig(inner="lora(rank=2)", blocks=1, budget_weight=5.0)
    )
    ids = {"input_ids": torch.arange(3, 15)[None], "labels": torch.arange(3, 15)[None]}
    labels = ids["labels"]
    out = model.train()(**ids)
    plain = model.get_base_model().loss_function(out.logits, labels, tiny.VOCABULARY)
    assert float(out.loss.detach()) > float(plain.detach()) + 0.5


def test_every_registered_configuration_has_its_class_in_the_face() -> None:
    names = {cls.__name__ for cls in CONFIGS.values()}
    assert names <= set(ours.__all__)
    assert len([cls for cls in CONFIGS.values() if issubclass(cls, Ours)]) == 16
