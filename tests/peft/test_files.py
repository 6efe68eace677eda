"""Folders of adapters: what is written beside what, what comes back, and that nothing is lost or mixed."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import trimtab as tt
from tests.oracles import kit
from trimtab.adapt import disk
from trimtab.cli import app
from trimtab.errors import (
    BaseMismatchError,
    ConfigError,
    FileFormatError,
    StorageError,
    UnknownNameError,
)
from trimtab.peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from trimtab.peft.state import get_peft_model_state_dict

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
FILES = {CONFIG, WEIGHTS, OURS, "README.md"}


def stirred(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def model_of(**options: Any) -> Any:
    return stirred(get_peft_model(kit.llama(), lora(**options))).eval()


def values(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {k: t.clone() for k, t in get_peft_model_state_dict(model, adapter_name=name).items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return kit.outputs(model, kit.batch_of(kit.llama()))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- where ------------------------------------------------------------------------------------------------


def test_what_lies_in_the_folder_stays(tmp_path: Path) -> None:
    """A checkpoint of a Trainer, say."""
    folder = tmp_path / "run" / "checkpoint-7"
    (folder / "global_step7").mkdir(parents=True)
    for name in ("optimizer.pt", "trainer_state.json", "global_step7/shard"):
        (folder / name).write_text(name)
    mine = model_of()
    mine.save_pretrained(folder)
    mine.save_pretrained(folder)
    assert names(folder) == FILES | {"optimizer.pt", "trainer_state.json", "global_step7"}
    assert (folder / "global_step7" / "shard").read_text() == "global_step7/shard"
    assert torch.equal(logits(PeftModel.from_pretrained(kit.llama(), folder).eval()), logits(mine))


def test_adapters_have_folders_of_their_own_and_can_be_chosen(tmp_path: Path) -> None:
    """S8: with another adapter called as a module is, PEFT's file of "default" is empty."""
    mine = model_of()
    for name in ("layers", "model"):
        mine.add_adapter(name, lora(r=2))
    stirred(mine)
    mine.save_pretrained(tmp_path / "all")
    assert names(tmp_path / "all") == FILES | {"layers", "model"}
    assert names(tmp_path / "all" / "layers") == FILES - {"README.md"}
    again = PeftModel.from_pretrained(kit.llama(), tmp_path / "all").eval()
    again.load_adapter(tmp_path / "all" / "layers", "b")
    again.load_adapter(tmp_path / "all", "c", subfolder="model")
    assert same(values(again), values(mine))
    assert same(values(again, "b"), values(mine, "layers"))
    assert same(values(again, "c"), values(mine, "model"))
    mine.save_pretrained(tmp_path / "one", selected_adapters=["layers"])
    assert names(tmp_path / "one") == {"layers", "README.md"}
    mine.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (tmp_path / "none").exists()
    with pytest.raises(UnknownNameError, match="Did you mean 'layers'"):
        mine.save_pretrained(tmp_path / "bad", selected_adapters=["default", "layer"])
    assert not (tmp_path / "bad").exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


def test_values_of_a_state_dict_that_is_given(tmp_path: Path) -> None:
    """As a Trainer gives it, gathered from shards."""
    mine = stirred(
        get_peft_model(kit.bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    )
    state = {key: tensor * 2 for key, tensor in mine.state_dict().items()}
    mine.save_pretrained(tmp_path, state_dict=state)
    written = load_file(tmp_path / WEIGHTS)
    assert same(written, {key: tensor * 2 for key, tensor in values(mine).items()})
    PeftModel.from_pretrained(kit.bert(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileFormatError, match="state_dict has no"):
        mine.save_pretrained(tmp_path, state_dict={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_changes_nothing_of_the_model(tmp_path: Path) -> None:
    mine = model_of().train()
    before, config = values(mine), mine.peft_config["default"].copied()
    mine.save_pretrained(tmp_path)
    assert mine.training
    assert not mine.peft_config["default"].inference_mode
    assert mine.peft_config["default"] == config
    assert same(values(mine), before)
    assert json.loads((tmp_path / CONFIG).read_text())["inference_mode"] is True


def test_options_that_do_nothing_here_are_refused(tmp_path: Path) -> None:
    mine = model_of()
    for options, message in (
        ({"safe_serialization": False}, "safetensors only"),
        ({"save_embedding_layers": True}, "modules_to_save"),
        ({"path_initial_model_for_weight_conversion": "x"}, "is not needed"),
        ({"safe_serialisation": True}, "safe_serialisation"),
    ):
        with pytest.raises(ConfigError, match=message):
            mine.save_pretrained(tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()


# -- the disk ---------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """The real thing: the system lets no file grow beyond 4 KiB, which is in the middle of the weights."""
    mine = model_of()
    (tmp_path / "optimizer.pt").write_text("state")
    mine.save_pretrained(tmp_path)
    before = contents(tmp_path)
    stirred(mine, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for folder in (tmp_path, tmp_path / "new" / "deeper"):
            with pytest.raises(StorageError, match=r"could not write into .* intact"):
                mine.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
    assert names(tmp_path) == FILES | {"optimizer.pt"}


@pytest.mark.parametrize("second_names", [True, False])
@pytest.mark.parametrize("refused", [OURS, WEIGHTS, CONFIG])
def test_a_disk_that_refuses_one_of_the_files_keeps_all_of_the_old(
    refused: str, second_names: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = model_of()
    for folder in (tmp_path / "old", tmp_path / "new"):
        if folder.name == "old":
            mine.save_pretrained(folder)
        before = contents(tmp_path)
        stirred(mine, 1)
        replace = os.replace

        def picky(source: Any, target: Any, replace: Any = replace) -> None:
            if Path(target).name == refused and not str(source).endswith(".old"):
                raise OSError(5, "Input/output error")
            replace(source, target)

        def no_links(*args: Any) -> None:
            raise OSError(1, "Operation not permitted")

        with monkeypatch.context() as patched:
            patched.setattr(disk.os, "replace", picky)
            if not second_names:
                patched.setattr(disk.os, "link", no_links)
            with pytest.raises(StorageError, match="Input/output error"):
                mine.save_pretrained(folder)
        assert contents(tmp_path) == before
    assert names(tmp_path) == {"old"}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, OURS])
def test_a_folder_in_the_way_of_a_file(name: str, tmp_path: Path) -> None:
    mine = model_of()
    mine.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("x")
    before = contents(tmp_path)
    with pytest.raises(StorageError, match=f"{name} is a folder, in the way"):
        stirred(mine, 1).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    mine = model_of()
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(StorageError):
            mine.save_pretrained(folder)
    mine.add_adapter("other", lora())
    (tmp_path / "other").write_text("precious")
    with pytest.raises(StorageError, match="other is a file"):
        mine.save_pretrained(tmp_path, selected_adapters=["other"])
    assert contents(tmp_path) == {"a": b"precious", "other": b"precious"}


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            stirred(model_of(), 1).save_pretrained(tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert contents(tmp_path) == before


# -- torn and foreign ---------------------------------------------------------------------------------------


def test_files_of_two_saves_are_not_taken_for_one(tmp_path: Path) -> None:
    """What a crash between two files leaves."""
    mine = model_of()
    mine.save_pretrained(tmp_path / "a")
    stirred(mine, 1).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / OURS).replace(tmp_path / "a" / OURS)
    fresh = get_peft_model(kit.llama(), lora())
    with pytest.raises(FileFormatError, match="does not match its checksum"):
        fresh.load_adapter(tmp_path / "a", "x")
    assert list(fresh.peft_config) == ["default"]
    for name in (CONFIG, WEIGHTS):
        whole = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FileFormatError, match=name):
            PeftModel.from_pretrained(kit.llama(), tmp_path / "b")
        (tmp_path / "b" / name).unlink()
        with pytest.raises(FileFormatError, match=f"has no {name}"):
            PeftModel.from_pretrained(kit.llama(), tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(whole)


def test_an_option_that_was_changed_by_hand_is_not_passed_over(tmp_path: Path) -> None:
    mine = model_of()
    mine.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 64}))
    with pytest.raises(FileFormatError, match=r"lora_alpha=64.*8.*remove trimtab.json"):
        PeftModel.from_pretrained(kit.llama(), tmp_path)
    (tmp_path / OURS).unlink()
    loud = PeftModel.from_pretrained(kit.llama(), tmp_path).eval()
    with kit.quiet():
        theirs = peft.PeftModel.from_pretrained(kit.llama(), str(tmp_path)).eval()
    kit.assert_close(logits(loud), logits(theirs), "outputs")


def test_what_another_program_wrote_over_ours_is_not_half_read(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    with kit.quiet():
        theirs = stirred(
            peft.get_peft_model(
                kit.llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
            )
        )
        theirs.save_pretrained(str(tmp_path))
    with pytest.raises(FileFormatError, match=r"another program.*remove trimtab.json"):
        PeftModel.from_pretrained(kit.llama(), tmp_path)
    (tmp_path / OURS).unlink()
    mine = PeftModel.from_pretrained(kit.llama(), tmp_path).eval()
    kit.assert_close(logits(mine), logits(theirs.eval()), "outputs")


def test_tensors_too_many_or_too_few_in_a_folder_of_peft_s(tmp_path: Path) -> None:
    """S5: PEFT passes over what it does not know, and begins at random where something is missing."""
    with kit.quiet():
        theirs = peft.get_peft_model(kit.llama(), peft.LoraConfig(target_modules=["q_proj"], r=4))
        theirs.save_pretrained(str(tmp_path))
    whole = load_file(tmp_path / WEIGHTS)
    key = next(iter(whole))
    for tensors in (
        {**whole, key.replace("q_proj", "k_proj"): whole[key].clone()},
        {**whole, key.replace("lora_A", "lora_C"): whole[key].clone()},
        {k: t for k, t in whole.items() if k != key},
        {**whole, "base_model.model.lm_head.weight": torch.zeros(97, 32)},
    ):
        save_file(tensors, tmp_path / WEIGHTS)
        fresh = kit.llama()
        with pytest.raises(ValueError, match=r"proj|lm_head"):
            PeftModel.from_pretrained(fresh, tmp_path)
        assert not hasattr(fresh, "trimtab")


# -- loading --------------------------------------------------------------------------------------------------


def test_loading_onto_a_name_that_is_taken_replaces_the_adapter_whole(tmp_path: Path) -> None:
    """S7: PEFT keeps the old configuration with the new weights."""
    model_of(lora_alpha=64).save_pretrained(tmp_path / "loud")
    model_of(r=2, target_modules=["k_proj"]).save_pretrained(tmp_path / "other")
    with kit.quiet():
        peft_s = stirred(
            peft.get_peft_model(
                kit.llama(), peft.LoraConfig(target_modules=["q_proj"], lora_alpha=99)
            )
        )
        peft_s.save_pretrained(str(tmp_path / "peft"))
    for folder in ("loud", "other", "peft"):
        mine = model_of()
        mine.add_adapter("second", lora())
        with pytest.warns(UserWarning, match=r"was of another configuration.*optimizer"):
            mine.load_adapter(tmp_path / folder, "default")
        whole = PeftModel.from_pretrained(kit.llama(), tmp_path / folder).eval()
        assert torch.equal(logits(mine), logits(whole))
        assert mine.peft_config["default"].options() == whole.peft_config["default"].options()
        assert mine.active_adapters == ["default"]
        assert set(mine.peft_config) == {"default", "second"}


def test_loading_the_same_kind_writes_into_the_parameters_that_an_optimizer_knows(
    tmp_path: Path,
) -> None:
    mine = model_of()
    mine.save_pretrained(tmp_path)
    saved, parameters = values(mine), dict(mine.named_parameters())
    stirred(mine, 1)
    mine.load_adapter(tmp_path, "default", is_trainable=True)
    assert same(values(mine), saved)
    assert all(parameters[name] is p for name, p in mine.named_parameters())
    assert any(p.requires_grad for p in mine.parameters())


def test_a_folder_that_cannot_be_loaded_leaves_the_adapter_that_was_there(tmp_path: Path) -> None:
    model_of(r=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / OURS).read_text())
    config["sites"] = [[f"{path}x", role, method] for path, role, method in config["sites"]]
    for entry in config["tensors"].values():
        entry["path"] += "x"
    (tmp_path / OURS).write_text(json.dumps(config))
    mine = model_of()
    before, out = values(mine), logits(mine)
    with pytest.raises(ValueError, match="no module"):
        mine.load_adapter(tmp_path, "default")
    assert same(values(mine), before)
    assert torch.equal(logits(mine), out)
    assert mine.peft_config["default"].r == 4  # type: ignore[attr-defined]


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    """S18: PEFT attaches whatever fits in shape."""
    mine = model_of()
    mine.save_pretrained(tmp_path)
    other = kit.llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with pytest.raises(BaseMismatchError, match="another base"):
        PeftModel.from_pretrained(other, tmp_path)
    wrapped = get_peft_model(other, lora())
    before = values(wrapped)
    with pytest.raises(BaseMismatchError, match="another base"):
        wrapped.load_adapter(tmp_path, "x")
    with pytest.raises(BaseMismatchError, match="another base"):
        wrapped.load_adapter(tmp_path, "default")  # alike, but for the base
    assert same(values(wrapped), before)


def test_names_tell_of_another_base_where_there_is_nothing_else_to_compare(tmp_path: Path) -> None:
    def named(name: str) -> nn.Module:
        model = kit.llama()
        model.name_or_path = model.config._name_or_path = name  # type: ignore[union-attr]
        return model

    with kit.quiet():
        theirs = peft.get_peft_model(
            named("org/model-A"), peft.LoraConfig(target_modules=["q_proj"])
        )  # type: ignore[arg-type]
    with kit.quiet("Could not find a config file"):
        theirs.save_pretrained(str(tmp_path))
    with pytest.warns(
        UserWarning, match=r"made for 'org/model-A', and this model is 'org/model-B'"
    ):
        PeftModel.from_pretrained(named("org/model-B"), tmp_path)
    for silent in ("org/model-A", "/models/model-A", ""):
        PeftModel.from_pretrained(named(silent), tmp_path)


@pytest.mark.parametrize("training", [True, False])
def test_loading_changes_neither_mode_nor_who_learns(training: bool, tmp_path: Path) -> None:
    """S19 and S20."""
    model_of().save_pretrained(tmp_path)
    mine = model_of().train(training)
    mine.load_adapter(tmp_path, "ref")
    assert all(module.training == training for module in mine.modules())

    def learn() -> set[str]:
        return {name.split(".")[-2] for name, p in mine.named_parameters() if p.requires_grad}

    assert learn() == {"default"}
    mine.set_adapter("ref")
    assert learn() == set()
    mine.set_adapter("default")
    assert learn() == {"default"}
    mine.load_adapter(tmp_path, "second", is_trainable=True)
    mine.set_adapter("second")
    assert learn() == {"second"}
    assert all(module.training == training for module in mine.modules())


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(kit.llama(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert frozen.peft_config["default"].inference_mode
    learns = PeftModel.from_pretrained(kit.llama(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in learns.parameters())
    with pytest.raises((UnknownNameError, TypeError), match="is_trainble"):
        PeftModel.from_pretrained(kit.llama(), tmp_path, is_trainble=True)


def test_a_configuration_that_is_given_must_be_that_of_the_file(tmp_path: Path) -> None:
    mine = model_of()
    mine.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kit.llama(), tmp_path, config=config).eval()
    assert torch.equal(logits(again), logits(mine))
    config.lora_alpha = 64  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"lora_alpha=64"):
        PeftModel.from_pretrained(kit.llama(), tmp_path, config=config)


# -- the core reads it ------------------------------------------------------------------------------------------


def test_the_core_and_the_command_line_read_it(tmp_path: Path) -> None:
    mine = model_of()
    mine.save_pretrained(tmp_path)
    adapter = tt.Adapter.load(tmp_path)
    assert same({f"base_model.model.{k}": t for k, t in adapter.tensors.items()}, values(mine))
    bare = kit.llama()
    tt.attach(bare, adapter)
    assert torch.equal(logits(bare), logits(mine))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "lora" in shown.output
