"""The face's benchmark, tiny: both sides do the same, and the report has what it promises."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import face, face_sides
from benchmarks.core import SideError
from tests.engine import kit

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    base = kit.base()
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("forked")
def test_it_measures_by_turns_and_writes_a_report(model: str, tmp_path: Path) -> None:
    options = [
        "--model",
        model,
        "--tiny",
        "--rounds",
        "1",
        "--warmup",
        "1",
        "--patience",
        "0",
        "--threads",
        "1",
    ]
    options += [
        "--rows",
        "2",
        "--tokens",
        "16",
        "--steps",
        "2",
        "--adapters",
        "4",
        "--parts",
        "load",
        "trainer",
    ]
    assert command.main(["face", *options, "--out", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "face.json").read_text("utf-8"))["parts"]
    assert parts["load"]["adapters"] == 4 and parts["load"]["faster"]["median"] > 0
    assert parts["trainer"]["loss_apart"] < 0.02 and parts["trainer"]["speed_ratio"]["median"] > 0
    table = (tmp_path / "face.md").read_text("utf-8")
    for words in ("Loading 4 adapters", "`Trainer`", "**ratio**"):
        assert words in table


def test_a_model_without_weights_gets_the_same_adapter_from_both() -> None:
    with warnings.catch_warnings():
        made = {side: face_sides.Meta(side, SMALL) for side in face.SIDES}
        found = {side: each.step(0) for side, each in made.items()}
    assert (
        found[face.OURS]["sizes"] == found[face.PEER]["sizes"] and found[face.OURS]["sizes"][0] > 0
    )
    assert all(each["seconds"] > 0 for each in found.values())


def test_an_import_is_timed_in_a_process_of_its_own() -> None:
    light = (
        "from types import SimpleNamespace\n"
        "sys.modules.update(torch=sys, transformers=SimpleNamespace(PreTrainedModel=0))"
    )
    assert 0.1 < face._import_seconds(light, "time.sleep(0.1)") < 60
    with pytest.raises(SideError, match="nothing_like_it"):
        face._import_seconds(light, "import nothing_like_it")


def test_the_tables_of_all_parts() -> None:
    from benchmarks.core import Spread

    one = Spread(1.0, 0.5, 2.0)
    lines = "\n".join(
        face.tables(
            {
                "imports": {"seconds": {"peft": one}},
                "meta": {"parameters": 7e9, "seconds": {"peft": {"first": one, "second": one}}},
            }
        )
    )
    assert (
        "| peft | 1.000 (0.500 … 2.000) |" in lines
        and "7.00 B parameters on the meta device" in lines
    )
