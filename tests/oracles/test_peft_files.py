"""Adapter folders both ways between PEFT and us, and folders that must be refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from tests.oracles import kit
from tests.oracles.cases import CASES, ENCODED, Case
from tests.oracles.variants import VARIANTS
from trimtab.adapt.files import CONFIG, OURS, WEIGHTS
from trimtab.errors import AttachError, FileFormatError, UnsupportedError

EMBEDDINGS = "Setting `save_embedding_layers` to `True`"  # PEFT adds a copy of a targeted embedding
every_case = pytest.mark.parametrize("case", [*CASES, *VARIANTS], ids=lambda case: case.name)


def written_by_peft(case: Case, folder: Path) -> PeftModel:
    theirs = kit.peft_model(case.make, case.theirs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with kit.quiet(EMBEDDINGS):
        theirs.save_pretrained(folder)
    return theirs


def written_by_us(case: Case, folder: Path) -> tuple[torch.nn.Module, tt.Adapter]:
    model = case.make()
    adapter = tt.attach(model, case.ours, "default")
    kit.stir(adapter)
    adapter.save(folder)
    return model, adapter


def without_rebuilt(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what PEFT makes from the base again, and passes over in a file."""
    slots = tuple(f".{slot}" for slot in case.ours.rebuilt)
    return {key: tensor for key, tensor in tensors.items() if not (slots and key.endswith(slots))}


@every_case
def test_we_read_what_peft_writes(case: Case, tmp_path: Path) -> None:
    theirs = written_by_peft(case, tmp_path / "theirs")
    adapter = tt.Adapter.load(tmp_path / "theirs")
    model = case.make()
    attached = tt.attach(model, adapter, "loaded")
    batch = kit.batch_of(model)
    assert kit.acts(model, "loaded", batch)
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), "outputs")
    attached.save(tmp_path / "again")
    before, after = (
        load_file(tmp_path / "theirs" / WEIGHTS),
        load_file(tmp_path / "again" / WEIGHTS),
    )
    regenerated = (".base_layer.weight", *(f".{name}" for name in case.ours.peft_drawn))
    copies = {key for key in before if key.endswith(regenerated)}
    after = without_rebuilt(case, after)
    assert after.keys() == before.keys() - copies
    assert all(torch.equal(after[key], before[key]) for key in after)


@every_case
def test_peft_reads_what_we_write(case: Case, tmp_path: Path) -> None:
    model, _ = written_by_us(case, tmp_path / "ours")
    with kit.quiet():
        theirs = PeftModel.from_pretrained(case.make(), tmp_path / "ours").eval()
        held = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    written = without_rebuilt(case, load_file(tmp_path / "ours" / WEIGHTS))
    assert held.keys() == written.keys()
    assert all(torch.equal(held[key], written[key]) for key in held)
    batch = kit.batch_of(model)
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), "outputs")


@every_case
def test_what_we_write_comes_back_bitwise_through_peft(case: Case, tmp_path: Path) -> None:
    _, adapter = written_by_us(case, tmp_path / "ours")
    with kit.quiet(EMBEDDINGS):
        theirs = PeftModel.from_pretrained(case.make(), tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
    again = tt.Adapter.load(tmp_path / "theirs")
    mine = without_rebuilt(case, adapter.tensors)
    assert again.tensors.keys() == mine.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in mine.items())


@every_case
def test_what_we_write_comes_back_bitwise(case: Case, tmp_path: Path) -> None:
    _, adapter = written_by_us(case, tmp_path / "ours")
    assert tt.Adapter.load(tmp_path / "ours") == adapter


@pytest.mark.parametrize("case", ENCODED, ids=lambda case: case.name)
def test_a_table_made_by_an_encoder_is_shared_without_it(case: Case, tmp_path: Path) -> None:
    """Both ways; our training form, which can be trained on, is not for PEFT."""
    theirs = written_by_peft(case, tmp_path / "theirs")
    model = case.make()
    tt.attach(model, tt.Adapter.load(tmp_path / "theirs"), "loaded")
    batch = kit.batch_of(model)
    assert kit.acts(model, "loaded", batch)
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), "outputs")
    model, adapter = written_by_us(case, tmp_path / "training")
    with pytest.raises((ValueError, KeyError), match="TRIMTAB_"), kit.quiet():
        PeftModel.from_pretrained(case.make(), tmp_path / "training")
    tt.exported(adapter).save(tmp_path / "shared")
    with kit.quiet():
        theirs = PeftModel.from_pretrained(case.make(), tmp_path / "shared").eval()
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), "outputs")


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3),
        PromptEncoderConfig(
            task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3, encoder_hidden_size=6
        ),
        PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3),
    ],
    ids=["prompt", "ptuning", "prefix"],
)
def test_what_peft_writes_for_an_encoder_decoder_is_read_as_it_acts(
    config: PeftConfig, tmp_path: Path
) -> None:
    """Half the rows of a prompt never act, and a prefix's layers share entries of its table."""
    theirs = written_by_peft(Case("t5", kit.t5, config, tt.Prompt()), tmp_path)
    adapter = tt.Adapter.load(tmp_path)
    model = kit.t5()
    tt.attach(model, adapter, "loaded")
    batch = kit.batch_of(model)
    assert kit.acts(model, "loaded", batch)
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), "outputs")


# -- what PEFT adds -----------------------------------------------------------------------------------


def test_the_copy_of_an_embedding_that_peft_adds_is_left_out(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "input-embedding")
    written_by_peft(case, tmp_path)
    assert any(
        key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / WEIGHTS)
    )
    assert all("base_layer" not in key for key in tt.Adapter.load(tmp_path).tensors)


def test_an_adapter_that_peft_lacks_is_refused_by_it(tmp_path: Path) -> None:
    """PEFT would drop what it does not know in silence, so such a folder names a type it has not."""
    for make, method in (
        (kit.gpt2, tt.IA3()),  # PEFT rescales the queries of a fused layer too
        (kit.t5, tt.Prefix(length=2)),  # PEFT puts one into cross-attention, none into the encoder
        (
            kit.models.mixtral,
            tt.LoRA(rank=2, dropout=0.1, targets="gate_up_proj"),
        ),  # PEFT has none there
        (
            kit.models.qwen3_moe,
            tt.LoRA(rank=2, targets="down_proj"),
        ),  # it takes that for the experts'
        (kit.models.mixed, tt.LoRA(rank=2, targets="grouped")),  # and its factors are not grouped
        (kit.bert, tt.BitFit()),
    ):
        tt.attach(make(), method, "default").save(tmp_path / method.kind)
        # where trimtab.peft is imported, PEFT knows our types, and our tuner refuses the tensors
        with pytest.raises((ValueError, KeyError, RuntimeError)), kit.quiet():
            PeftModel.from_pretrained(make(), tmp_path / method.kind)
        assert tt.Adapter.load(tmp_path / method.kind).method == method


# -- folders that must be refused ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small LoRA folder of PEFT's."""
    config = LoraConfig(target_modules=["q_proj"], r=2)
    with kit.quiet():
        kit.peft_model(kit.llama, config).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | options))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lora_beta", 3, "unknown option 'lora_beta'"),
        ("monteclora_config", {"samples": 3}, "unknown option 'samples' of monteclora_config"),
        ("velora_config", {"scales": 3}, "unknown option 'scales' of velora_config"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("init_lora_weights", "corda", "changed its base"),
        ("init_lora_weights", "lora_ga", "changed its base"),
        ("peft_type", "GLORA", "GLORA"),
        ("peft_type", "LORAX", "Did you mean 'LORA'"),
    ],
)
def test_an_option_that_we_lack_raises(folder: Path, option: str, value: Any, message: str) -> None:
    change(folder, **{option: value})
    with pytest.raises((FileFormatError, UnsupportedError), match=message):
        tt.Adapter.load(folder)


def test_two_variants_in_one_raise(folder: Path) -> None:
    change(folder, use_dora=True, kasa_config={"beta": 0.1, "gamma": 0.1})
    with pytest.raises(UnsupportedError, match="use_dora and kasa_config are two methods in one"):
        tt.Adapter.load(folder)


def test_an_option_at_its_default_is_read(folder: Path) -> None:
    change(folder, use_qalora=False, kasa_config=None, rank_pattern={}, qalora_group_size=16)
    assert tt.Adapter.load(folder).method == tt.LoRA(rank=2, alpha=8, targets=("q_proj",))


@pytest.mark.filterwarnings("ignore:.*not to use rslora")  # PEFT, of its conversion
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"use_dora": True},
    ],
)
def test_a_file_whose_base_was_changed_acts_on_the_base_as_it_is(
    init: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT takes the first factors out of the base again when it loads; here they are kept beside the others."""
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=init, **options)
    case = Case(init, kit.llama, config, tt.LoRA())
    theirs = written_by_peft(case, tmp_path / "theirs")
    adapter = tt.Adapter.load(tmp_path / "theirs")
    for deed, name in (
        (lambda: adapter.save(tmp_path / "early"), "save"),
        (lambda: tt.exported(adapter), "export"),
        (lambda: tt.scaled(adapter, 2), "scale or add"),
        (lambda: tt.add([adapter, adapter], name="two"), "scale or add"),
    ):
        with pytest.raises(UnsupportedError, match=f"attach it to that base before you {name}"):
            deed()
    model = kit.llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attached = tt.attach(model, adapter, "loaded")
    batch = kit.batch_of(model)
    with torch.no_grad():
        there = kit.outputs(theirs, batch)
        kit.assert_close(kit.outputs(model, batch), there, "outputs")
    attached.save(tmp_path / "ours")
    plain = tt.exported(attached)
    tt.detach(model, "loaded")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    tt.attach(model, tt.Adapter.load(tmp_path / "ours"), "again")
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), there, "ours")
    plain.save(tmp_path / "plain")
    if "rank_pattern" not in options:
        with kit.quiet(), torch.no_grad():
            again = PeftModel.from_pretrained(kit.llama(), tmp_path / "plain").eval()
            kit.assert_close(kit.outputs(again, batch), there, "plain")


def test_the_converted_form_of_a_file_whose_base_was_changed_is_read(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa_niter_4")
    theirs = kit.peft_model(kit.llama, config)
    with kit.quiet("PiSSA changes the base weights"):
        theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
        theirs.save_pretrained(tmp_path / "first")
        theirs.peft_config["default"].init_lora_weights = "pissa_niter_4"
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.5)
        theirs.save_pretrained(tmp_path / "raw")
        theirs.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first")
        )
    with pytest.warns(UserWarning, match="path_initial_model_for_weight_conversion"):
        tt.Adapter.load(tmp_path / "raw")
    model = kit.llama()
    tt.attach(model, tt.Adapter.load(tmp_path / "converted"), "loaded")
    batch = kit.batch_of(model)
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), kit.outputs(theirs, batch), "outputs")


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.k_proj.base_layer.weight",
        "anything",
    ],
)
def test_an_unknown_key_raises(folder: Path, key: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, key: torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises(FileFormatError, match=key):
        tt.Adapter.load(folder)


def test_a_missing_or_misplaced_tensor_raises(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    value = tensors.pop(key)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AttachError, match="lacks 1"):
        tt.attach(kit.llama(), tt.Adapter.load(folder), "x")
    save_file({**tensors, key.replace(".1.", ".7."): value}, folder / WEIGHTS)
    with pytest.raises(AttachError, match="layers.7"):
        tt.attach(kit.llama(), tt.Adapter.load(folder), "x")


def test_another_shape_raises(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(iter(tensors))
    save_file({**tensors, key: torch.zeros(3, 3)}, folder / WEIGHTS)
    with pytest.raises(AttachError, match="shape"):
        tt.attach(kit.llama(), tt.Adapter.load(folder), "x")


def test_a_whole_module_missing_from_the_weights_raises(folder: Path) -> None:
    """PEFT warns and goes on with a random adapter there; half an adapter is no adapter."""
    tensors = load_file(folder / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if "layers.1" not in key}
    save_file(kept, folder / WEIGHTS)
    with pytest.raises(AttachError, match=r"layers\.1\.self_attn\.q_proj"):
        tt.attach(kit.llama(), tt.Adapter.load(folder), "x")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileFormatError, match="convert adapter_model.bin"):
        tt.Adapter.load(folder)


def test_torn_and_missing_files_raise(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match="torn or foreign"):
        tt.Adapter.load(folder)
    (folder / WEIGHTS).write_bytes(whole)
    (folder / CONFIG).write_text("{")
    with pytest.raises(FileFormatError, match="is not JSON"):
        tt.Adapter.load(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(FileFormatError, match=CONFIG):
        tt.Adapter.load(folder)
    assert not (folder / OURS).exists()
