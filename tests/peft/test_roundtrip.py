"""Files both ways: what PEFT writes, the face reads, and what the face writes, PEFT reads; the same outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.oracles import cases, kit, variants
from trimtab.errors import AttachError, UnsupportedError
from trimtab.peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from trimtab.peft.utils.hotswap import hotswap_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFTS = {"peft_version", "auto_mapping", "runtime_config"}
"""What PEFT puts into a configuration by itself."""
QUIET = (
    "Setting `save_embedding_layers`",
    "Could not identify embedding",
    "The following rank_pattern keys",
    ".*fan_in_fan_out is set to False",
    ".*not to use rslora",
)


@dataclass(frozen=True)
class Case:
    """A model, a configuration of PEFT's, and where the two differ."""

    name: str
    make: Callable[[], nn.Module]
    config: peft.PeftConfig


def lora(name: str, make: Callable[[], nn.Module] = kit.llama, **options: Any) -> Case:
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    with kit.quiet(*QUIET):
        return Case(name, make, peft.LoraConfig(**given))


def method(name: str, make: Callable[[], nn.Module], config: peft.PeftConfig) -> Case:
    return Case(name, make, config)


FROM_THE_CORE = [
    Case(case.name, case.make, case.theirs)
    for each in (
        cases.LORA, cases.DORA, cases.ADALORA, cases.IA3, cases.PREFIX, cases.PROMPT, cases.LLAMA_ADAPTER, cases.WEIGHT,
        cases.ROTATION, cases.BIASED, cases.SELECTION, cases.SHIRA, variants.VARIANTS,
    )
    for case in each
]  # fmt: skip
"""The settings whose mathematics the oracles compare; here they go through configurations and models."""
OURS_ALONE = [Case(case.name, case.make, case.theirs) for case in cases.ENCODED]
"""What the face writes so that training can go on; PEFT has no such file."""
QV = ["q_proj", "v_proj"]
TOKENS = list(range(3, 40))
mixtral, qwen3_moe = kit.loud(tiny.mixtral), kit.loud(tiny.qwen3_moe)
with kit.quiet(*QUIET):
    MORE = [
        lora("dropout", lora_dropout=0.1),
        lora("alpha-zero", lora_alpha=0),
        lora("one-layer", layers_to_transform=1),
        lora("layers-pattern", layers_to_transform=[0, 2], layers_pattern="layers"),
        lora("exclude-regex", exclude_modules=r".*\.0\..*"),
        lora("exclude-list", exclude_modules=["layers.1.self_attn.q_proj"]),
        lora("whole-paths", target_modules=["model.layers.0.self_attn.q_proj", "lm_head"]),
        lora("patterns-regex", rank_pattern={"^model.layers.0.self_attn.q_proj": 2}, alpha_pattern={".*v_proj": 3}),
        lora("rslora-patterns", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        lora("dora-patterns", use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        lora("bias-all-head", kit.bert, target_modules=["query"], bias="all", task_type="SEQ_CLS"),
        lora("bias-dora", kit.bert, target_modules=["query"], bias="lora_only", use_dora=True),
        lora("embedding-saved", modules_to_save=["embed_tokens", "lm_head"]),
        lora("norm-saved", modules_to_save=["input_layernorm"]),
        lora("seq-cls", kit.llama_classifier, task_type="SEQ_CLS"),
        lora("seq-cls-roberta", kit.roberta, target_modules=["query"], task_type="SEQ_CLS"),
        lora("seq2seq", kit.t5, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
        lora("features", task_type="FEATURE_EXTRACTION"),
        lora("gaussian", init_lora_weights="gaussian"),
        lora("orthogonal", init_lora_weights="orthogonal"),
        lora("random", init_lora_weights=False),
        lora("inference", inference_mode=True),
        method("vera-without-projection", kit.llama, peft.VeraConfig(target_modules=QV, r=8, save_projection=False)),
        method("randlora-without", kit.llama, peft.RandLoraConfig(target_modules=QV, r=8, save_projection=False)),
        method("shira-patterns", kit.llama, peft.ShiraConfig(target_modules=QV, r=2, random_seed=3)),
        method("ia3-defaults", kit.llama, peft.IA3Config(task_type="CAUSAL_LM")),
        method("lora-defaults", kit.gpt2, peft.LoraConfig(task_type="CAUSAL_LM")),
        method("norms-defaults", kit.llama, peft.LNTuningConfig(task_type="CAUSAL_LM")),
        method("tokens-defaults", kit.llama, peft.TrainableTokensConfig(token_indices=list(range(3, 40)))),
        lora("tokens-beside", trainable_token_indices=TOKENS),
        lora("tokens-and-head", modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": TOKENS}),
        lora("tokens-of-both-ends", trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS}),
        lora("tokens-of-two-tables", kit.bert, target_modules=["query"], task_type="SEQ_CLS", use_dora=True,
             trainable_token_indices={"word_embeddings": TOKENS, "position_embeddings": [0, 1]}),
        lora("experts", mixtral, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        lora("experts-one", mixtral, target_modules=[], target_parameters=["experts.down_proj"]),
        lora("experts-rslora", mixtral, target_modules=[], target_parameters=["down_proj", "gate_up_proj"],
             use_rslora=True),
        lora("experts-some-layers", qwen3_moe, target_modules=[], target_parameters=["experts.gate_up_proj"]),
    ]  # fmt: skip
    MORE += [
        method("oft-dropout", kit.llama, peft.OFTConfig(target_modules=QV, oft_block_size=8, module_dropout=0.3)),
        method("boft-dropout", kit.bert, peft.BOFTConfig(
            target_modules=["query", "output.dense"], boft_dropout=0.3)),
        method("hira-dropout", kit.llama, peft.HiraConfig(target_modules=QV, r=4, hira_dropout=0.3)),
        method("miss-dropout", kit.llama, peft.MissConfig(target_modules=QV, r=4, miss_dropout=0.3)),
        method("miss-bat-dropout", kit.llama, peft.MissConfig(
            target_modules=["q_proj"], r=4, init_weights="bat", miss_dropout=0.3)),
        method("randlora-dropout", kit.llama, peft.RandLoraConfig(
            target_modules=QV, r=8, randlora_alpha=80, randlora_dropout=0.3)),
        method("lokr-dropouts", kit.convolutions, peft.LoKrConfig(
            target_modules=["line", "square"], r=1, rank_dropout=0.3, rank_dropout_scale=True, module_dropout=0.2)),
        method("oft-random", kit.llama, peft.OFTConfig(
            target_modules=QV, oft_block_size=8, coft=True, eps=0.4, init_weights=False)),
        method("loha-tucker-random", kit.pictures, peft.LoHaConfig(
            target_modules=["square"], r=3, use_effective_conv2d=True, init_weights=False)),
    ]  # fmt: skip
    REFUSED = [
        lora("qalora", use_qalora=True, qalora_group_size=8),  # on dense layers PEFT passes over it
    ]  # fmt: skip
"""Options that the core lacks: never read or written as something else."""
ALL = [*FROM_THE_CORE, *OURS_ALONE, *MORE]


def _dilated() -> nn.Module:
    """One of its convolutions is dilated, which PEFT forgets."""
    model = kit.pictures()
    torch.manual_seed(0)
    model.square = nn.Conv2d(2, 8, 3, stride=2, padding=2, dilation=2)
    return model


def stirred(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def theirs_of(case: Case) -> Any:
    with kit.quiet(*QUIET):
        model = peft.get_peft_model(case.make(), copy.deepcopy(case.config))  # type: ignore[arg-type]
        if case.config.inference_mode:
            model.set_requires_grad("default", True)
    return stirred(model)


def config_of(case: Case) -> PeftConfig:
    """The face's configuration, of the options that PEFT's has."""
    options = {k: v for k, v in case.config.to_dict().items() if k not in PEFTS}
    return PeftConfig.from_peft_type(**copy.deepcopy(options))


def ours_of(case: Case) -> Any:
    model = get_peft_model(case.make(), config_of(case))
    if case.config.inference_mode:
        model.set_requires_grad("default", True)
    return stirred(model)


def logits(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        return kit.outputs(model, kit.batch_of(case.make()))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_face_reads_what_peft_writes_and_writes_it_again(case: Case, tmp_path: Path) -> None:
    theirs = theirs_of(case)
    with kit.quiet(*QUIET):
        theirs.save_pretrained(str(tmp_path / "theirs"))
    mine = PeftModel.from_pretrained(case.make(), tmp_path / "theirs").eval()
    expected = logits(theirs, case)
    kit.assert_close(logits(mine, case), expected, "read")
    if case.name != "alpha-zero":
        assert (logits(case.make(), case) - expected).abs().max() > 1e-3
    assert type(mine).__name__ == type(theirs).__name__
    mine.save_pretrained(tmp_path / "again")
    with kit.quiet(*QUIET):
        back = peft.PeftModel.from_pretrained(case.make(), str(tmp_path / "again")).eval()  # type: ignore[arg-type]
    kit.assert_close(logits(back, case), expected, "written again")


@pytest.mark.parametrize("case", [*FROM_THE_CORE, *MORE], ids=lambda case: case.name)
def test_peft_reads_what_the_face_writes(case: Case, tmp_path: Path) -> None:
    mine = ours_of(case)
    mine.save_pretrained(tmp_path)
    with kit.quiet(*QUIET):
        theirs = peft.PeftModel.from_pretrained(case.make(), str(tmp_path)).eval()  # type: ignore[arg-type]
    kit.assert_close(logits(theirs, case), logits(mine, case), "outputs")
    if case.name != "alpha-zero":
        assert (logits(case.make(), case) - logits(mine, case)).abs().max() > 1e-3
    assert type(theirs).__name__ == type(mine).__name__
    again = PeftModel.from_pretrained(case.make(), tmp_path).eval()
    assert torch.equal(logits(again, case), logits(mine, case))


ELSEWHERE = [
    method("oft-kernel", kit.pictures, peft.OFTConfig(target_modules=["square", "head"], oft_block_size=2)),
    method("hra-dilated", _dilated, peft.HRAConfig(target_modules=["square"], r=4)),
    method("boft-dilated", _dilated, peft.BOFTConfig(target_modules=["square"], boft_block_size=2)),
    lora("lora-dilated", _dilated, target_modules=["square"]),
]  # fmt: skip


@pytest.mark.parametrize("case", ELSEWHERE, ids=lambda case: case.name)
def test_a_file_of_another_function_is_refused_and_ours_is_kept_to_ourselves(
    case: Case, tmp_path: Path
) -> None:
    with kit.quiet(*QUIET):
        theirs_of(case).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(UnsupportedError, match="'square' PEFT's .* is another function"):
        PeftModel.from_pretrained(case.make(), tmp_path / "theirs")
    mine = ours_of(case)
    before = logits(mine, case)
    with pytest.raises(UnsupportedError, match="'square' PEFT's .* is another function"):
        mine.load_adapter(tmp_path / "theirs", "default")
    with pytest.raises(UnsupportedError, match="'square' PEFT's .* is another function"):
        hotswap_adapter(mine, tmp_path / "theirs", "default")
    assert torch.equal(logits(mine, case), before)
    mine.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["peft_type"].startswith("TRIMTAB_")
    again = PeftModel.from_pretrained(case.make(), tmp_path / "ours").eval()
    assert torch.equal(logits(again, case), logits(mine, case))


def test_peft_s_oft_of_a_kernel_is_ours_once_it_is_merged() -> None:
    """Before, it is not even the identity where nothing turns: entries of patches are put back at other places."""
    case = ELSEWHERE[0]
    with kit.quiet(*QUIET):
        theirs = peft.get_peft_model(case.make(), copy.deepcopy(case.config)).eval()  # type: ignore[arg-type]
    mine = get_peft_model(case.make(), config_of(case)).eval()
    assert (logits(theirs, case) - logits(case.make(), case)).abs().max() > 1e-2
    kit.assert_close(logits(mine, case), logits(case.make(), case), "at first")
    kit.stir(mine.base_model.adapters["default"])
    kit.give(kit.paired(mine.base_model.adapters["default"], theirs))
    assert (logits(theirs, case) - logits(mine, case)).abs().max() > 1e-2
    kit.assert_close(logits(theirs.merge_and_unload(), case), logits(mine, case), "merged")


def test_a_pattern_of_ranks_of_hira_is_obeyed_and_read_by_what_the_file_holds(
    tmp_path: Path,
) -> None:
    """PEFT passes over it in its first adapter, and obeys it in the second one."""
    config = peft.HiraConfig(target_modules=QV, r=4, rank_pattern={"q_proj": 2})
    case = method("hira-patterns", kit.llama, config)
    theirs = theirs_of(case)
    theirs.add_adapter("second", copy.deepcopy(config))
    theirs.set_adapter("second")
    stirred(theirs).save_pretrained(str(tmp_path / "theirs"))
    for who, folder, rank in (
        ("default", tmp_path / "theirs", 4),
        ("second", tmp_path / "theirs" / "second", 2),
    ):
        theirs.set_adapter(who)
        mine = PeftModel.from_pretrained(case.make(), folder).eval()
        kit.assert_close(logits(mine, case), logits(theirs, case), who)
        shapes = {k: t.shape[0] for k, t in mine.base_model.adapters["default"].tensors.items()}
        assert {n for key, n in shapes.items() if key.endswith("q_proj.hira_A")} == {rank}
    mine = ours_of(case)
    assert {
        (key.split(".")[-2], t.shape[0])
        for key, t in mine.base_model.adapters["default"].tensors.items()
        if key.endswith("hira_A")
    } == {("q_proj", 2), ("v_proj", 4)}
    mine.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["peft_type"] == "TRIMTAB_HIRA"
    again = PeftModel.from_pretrained(case.make(), tmp_path / "ours").eval()
    assert torch.equal(logits(again, case), logits(mine, case))


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_the_core_lacks_is_refused_in_a_file_and_in_a_configuration(
    case: Case, tmp_path: Path
) -> None:
    """Or is kept to ourselves, where our function of that name is another than PEFT's."""
    with kit.quiet(*QUIET):
        theirs_of(case).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises((UnsupportedError, AttachError), match=r"not in Trimtab|lacks it|has shape"):
        PeftModel.from_pretrained(case.make(), tmp_path / "theirs")
    try:
        mine = ours_of(case)
    except UnsupportedError:
        return
    mine.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["peft_type"].startswith("TRIMTAB_")


@pytest.mark.parametrize("case", OURS_ALONE, ids=lambda case: case.name)
def test_an_encoder_in_training_is_for_us_and_its_table_for_peft(
    case: Case, tmp_path: Path
) -> None:
    """PEFT's file holds the table alone; the encoder lies beside it, in a file of ours."""
    mine = ours_of(case)
    mine.save_pretrained(tmp_path / "training")
    again = PeftModel.from_pretrained(case.make(), tmp_path / "training", is_trainable=True).eval()
    assert again.get_nb_trainable_parameters() == mine.get_nb_trainable_parameters()
    assert torch.equal(logits(again, case), logits(mine, case))
    tt.exported(mine.tuner.adapters["default"]).save(tmp_path / "shared")
    for folder in ("training", "shared"):
        with kit.quiet():
            theirs = peft.PeftModel.from_pretrained(case.make(), str(tmp_path / folder)).eval()  # type: ignore[arg-type]
        kit.assert_close(logits(theirs, case), logits(mine, case), folder)


def test_sums_of_adapters_of_experts_are_nested_too_or_kept_to_ourselves(tmp_path: Path) -> None:
    """PEFT would take one parameter's factors for another's."""
    one, two = (next(c for c in MORE if c.name == n) for n in ("experts", "experts-one"))
    parts = [ours_of(case).base_model.adapters["default"].detached() for case in (one, two)]
    for number, others in enumerate(([parts[0], parts[0]], [parts[0], parts[1]])):
        total = tt.add(others, name="default")
        model = one.make()
        tt.attach(model, total)
        folder = total.save(tmp_path / str(number))
        assert tt.Adapter.load(folder) == total
        kind = json.loads((folder / CONFIG).read_text())["peft_type"]
        assert number == 0 or kind == "TRIMTAB_LORA"
        if kind == "LORA":
            with kit.quiet(*QUIET):
                theirs = peft.PeftModel.from_pretrained(one.make(), str(folder)).eval()  # type: ignore[arg-type]
            kit.assert_close(logits(theirs, one), logits(model, one), "sum")


def test_state_dicts_of_experts_are_nested_as_peft_s() -> None:
    case = next(case for case in MORE if case.name == "experts")
    theirs, mine = theirs_of(case), ours_of(case)
    with kit.quiet(*QUIET):
        state = peft.get_peft_model_state_dict(theirs)
    set_peft_model_state_dict(mine, state)
    kit.assert_close(logits(mine, case), logits(theirs, case), "outputs")
    again = get_peft_model_state_dict(mine)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


SAID = {
    "task_type",
    "revision",
    "base_model_name_or_path",
    "inference_mode",
    "auto_mapping",
    "modules_to_save",
}


@pytest.mark.parametrize("case", [*FROM_THE_CORE, *MORE], ids=lambda case: case.name)
def test_the_two_configurations_say_the_same(case: Case, tmp_path: Path) -> None:
    """Ours leaves out what is at its default, and names the modules that were found, not how they were looked for."""
    with kit.quiet(*QUIET):
        theirs_of(case).save_pretrained(str(tmp_path / "theirs"))
    ours_of(case).save_pretrained(tmp_path / "ours")
    theirs, mine = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("theirs", "ours"))
    with kit.quiet(*QUIET):
        defaults = type(case.config)(**NEEDED.get(case.config.peft_type.value, {})).to_dict()
    assert mine.keys() <= theirs.keys()  # PEFT drops what it does not know, older ones stop
    for key, value in theirs.items():
        if key in SAID - {"modules_to_save"}:
            assert mine.get(key) == value, key
        elif key == "modules_to_save":
            heads = set(value or ()) - {
                "score",
                "classifier",
            }  # PEFT names both, whichever there is
            assert heads <= set(mine.get(key) or ())
        elif key in WHERE or key in FREE:
            continue
        elif key in mine:
            assert mine[key] == value or not (mine[key] or value), key
        else:
            assert value == defaults.get(key) or not value, key


WHERE = {
    "target_modules", "target_parameters", "trainable_token_indices", "feedforward_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
"""Ours are resolved."""
FREE = {"peft_version", "rank_pattern", "alpha_pattern", "save_projection", "init_lora_weights", "fan_in_fan_out",
        "num_attention_heads", "num_layers", "token_dim", "num_transformer_submodules", "encoder_hidden_size",
        }  # fmt: skip
"""Of the model, which PEFT finds again; of the first values; or how the same is stored."""
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10}, "TRAINABLE_TOKENS": {"token_indices": [0]},
}  # fmt: skip
