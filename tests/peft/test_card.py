"""The README of a folder: what the hub reads there, what a user wrote, and our facts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from huggingface_hub import ModelCard

import trimtab
from tests.oracles import kit
from trimtab.errors import StorageError
from trimtab.peft import LoraConfig, get_peft_model
from trimtab.peft.card import BEGIN, END


def named(make: Any, name: str = "org/model-A") -> Any:
    model = make()
    model.name_or_path = model.config._name_or_path = name
    return model


def ours(make: Any = kit.llama, task: str | None = "CAUSAL_LM", name: str = "org/model-A") -> Any:
    targets = ["query"] if make is kit.bert else ["q_proj"]
    config = LoraConfig(target_modules=targets, r=2, task_type=task)
    return get_peft_model(named(make, name), config)


def test_metadata_are_those_of_peft(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path / "ours")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    with kit.quiet():
        theirs = peft.get_peft_model(named(kit.llama), config)
    with kit.quiet("Could not find a config file"):
        theirs.save_pretrained(tmp_path / "theirs")
    mine = ModelCard.load(tmp_path / "ours" / "README.md").data.to_dict()
    assert mine == ModelCard.load(tmp_path / "theirs" / "README.md").data.to_dict()
    assert mine == {
        "library_name": "peft",
        "base_model": "org/model-A",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/model-A", "lora", "transformers"],
    }


@pytest.mark.parametrize(
    ("make", "task", "pipeline"),
    [
        (kit.bert, "SEQ_CLS", "text-classification"),
        (kit.llama, "FEATURE_EXTRACTION", "feature-extraction"),
        (kit.llama, None, None),
    ],
)
def test_the_pipeline_is_that_of_the_task(
    make: Any, task: str, pipeline: str | None, tmp_path: Path
) -> None:
    ours(make, task).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == pipeline


def test_a_folder_of_this_machine_is_not_a_name_for_the_hub(tmp_path: Path) -> None:
    ours(name=str(tmp_path)).save_pretrained(tmp_path / "a")
    data = ModelCard.load(tmp_path / "a" / "README.md").data.to_dict()
    assert "base_model" not in data
    assert data["tags"] == ["lora", "transformers"]


def test_what_a_user_wrote_stays_and_our_facts_are_made_anew(tmp_path: Path) -> None:
    wrote = (
        "---\nlicense: mit\ntags:\n- tickets\npipeline_tag: summarization\nmodel-index:\n- name: x\n  results: []\n"
        "---\n\n# Tickets\n\nTrained on tickets — mine.\n"
    )
    (tmp_path / "README.md").write_text(wrote, encoding="utf-8")
    model = ours()
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = yaml.safe_load(first.split("---")[1])
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "summarization"
    assert data["tags"] == ["base_model:adapter:org/model-A", "lora", "tickets", "transformers"]
    assert data["model-index"] == [{"name": "x", "results": []}]
    assert "# Tickets\n\nTrained on tickets — mine.\n" in first
    assert f"- Trimtab {trimtab.__version__}" in first
    assert "| default | . | LORA | 384 | 3 | PEFT, Trimtab |" in first
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == first
    changed = first.replace(END, f"{END}\n\nLicence of the data: ask.\n")
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    model.add_adapter(
        "other", LoraConfig(target_modules=["v_proj"], r=4, init_lora_weights="pissa")
    )
    model.save_pretrained(tmp_path)
    second = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert second.count(BEGIN) == second.count(END) == second.count("## Adapters") == 1
    assert "Licence of the data: ask." in second
    assert "| other | other | LORA | 576 | 3 | Trimtab |" in second


def test_a_readme_that_cannot_be_read_is_left_as_it_is(tmp_path: Path) -> None:
    for broken in (b"---\ntags: [\n---\n# Mine\n", b"\xff\xfe broken"):
        (tmp_path / "README.md").write_bytes(broken)
        with pytest.warns(UserWarning, match="left as it is"):
            ours().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == broken
        assert trimtab.Adapter.load(tmp_path).count == 384
    (tmp_path / "README.md").write_text("# No metadata\n")
    ours().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# No metadata" in text
    assert text.startswith("---\n")


def test_a_card_alone_and_one_in_the_way(tmp_path: Path) -> None:
    model = ours()
    model.create_or_update_model_card(tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["README.md"]
    (tmp_path / "bad" / "README.md").mkdir(parents=True)
    with pytest.warns(UserWarning, match="left as it is"):
        model.save_pretrained(tmp_path / "bad")
    assert trimtab.Adapter.load(tmp_path / "bad").count == 384
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file is a file"):
        model.create_or_update_model_card(tmp_path / "file")


def test_saving_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model = ours()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()
