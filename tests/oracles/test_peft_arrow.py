"""Arrow models against PEFT's, from the same folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

import trimtab as tt
import trimtab.peft as ours
from tests.oracles import kit
from trimtab.adapt.routed import routed
from trimtab.errors import ConfigError, UnsupportedError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four LoRAs of two alphas, written by PEFT."""
    made = []
    for number in range(4):
        folder = tmp_path_factory.mktemp(f"expert{number}")
        config = LoraConfig(
            r=4, lora_alpha=4 + 4 * (number % 2), target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )  # fmt: skip
        with kit.quiet():
            model = get_peft_model(kit.llama(), config)  # type: ignore[arg-type]
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            model.save_pretrained(folder)
        made.append(folder)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2, "rng_seed": 0},
        {"top_k": 1, "router_temperature": 0.5, "rng_seed": 7},
        {"top_k": 3, "use_gks": True, "rng_seed": 0},
    ],
)
def test_it_is_pefts_function(options: dict[str, Any], folders: list[Path]) -> None:
    tasks = folders[:3]
    general = folders[3:] if options.get("use_gks") else None
    with kit.quiet():
        other = create_arrow_model(
            kit.llama(), [str(f) for f in tasks], ArrowConfig(**options), general
        )  # type: ignore[arg-type]
        other.eval()
    base = kit.llama()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = ours.create_arrow_model(base, tasks, ours.ArrowConfig(**options), general).eval()
    assert model.active_adapter == "arrow_router" and "task_2" in model.peft_config
    batch = kit.batch_of(base)
    with torch.no_grad():
        found, expected = kit.outputs(model, batch), kit.outputs(other, batch)
        kit.assert_close(found, expected, "outputs")
        one = tt.Adapter.load(tasks[0], name="one")
        alone = kit.llama()
        tt.attach(alone, one)
        model.set_adapter("task_0")  # which GenKnowSub left as it was
        kit.assert_close(kit.outputs(model, batch), kit.outputs(alone, batch), "an expert")
        model.set_adapter("arrow_router")
        settings: dict[str, Any] = {
            **batch,
            "max_new_tokens": 4,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with kit.quiet():
            assert torch.equal(model.generate(**settings), other.generate(**settings))
    with pytest.raises(UnsupportedError, match="each token chooses"):
        model.merge_adapter()
    model.unload()
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_a_router_is_one_folder_of_ours(folders: list[Path], tmp_path: Path) -> None:
    loaded = [tt.Adapter.load(folder, name=f"e{n}") for n, folder in enumerate(folders)]
    router = routed(loaded[:3], general=loaded[3:], top_k=2, name="router")
    model = kit.llama()
    attached = tt.attach(model, router)
    batch = kit.batch_of(model)
    with torch.no_grad():
        expected = kit.outputs(model, batch)
    attached.save(tmp_path)
    again = kit.llama()
    tt.attach(again, tt.Adapter.load(tmp_path))
    with torch.no_grad():
        assert torch.equal(kit.outputs(again, batch), expected)
    shuffled = routed(loaded[2::-1], general=loaded[3:], top_k=2, name="shuffled")
    tt.attach(model, shuffled)
    with tt.using(model, "shuffled"), torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), expected, "in another order")


def test_what_cannot_be_routed_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one folder"):
        ours.create_arrow_model(kit.llama(), [], ours.ArrowConfig())
    with pytest.raises(ConfigError, match="needs general_adapter_paths"):
        ours.create_arrow_model(kit.llama(), folders, ours.ArrowConfig(use_gks=True))
    with pytest.raises(ConfigError, match="must be above 0"):
        ours.ArrowConfig(top_k=0)
    with pytest.raises(ConfigError, match="are to be attached LoRAs"):
        ours.get_peft_model(kit.llama(), ours.LoraConfig(arrow_config=ours.ArrowConfig()))
    first = tt.Adapter.load(folders[0], name="first")
    for method, text in (
        ("lora(rank=2, targets=['q_proj', 'down_proj'])", "they must have one"),
        ("lora(rank=4, targets=['q_proj'])", "different layers"),
    ):
        other = tt.attach(kit.llama(), method, "other").detached()
        with pytest.raises(ConfigError, match=text):
            routed([first, other])
    with pytest.raises(UnsupportedError, match="no plain LoRA"):
        routed([tt.attach(kit.llama(), "ia3", "other").detached()])
    with kit.quiet():
        theirs = create_arrow_model(
            kit.llama(), [str(f) for f in folders[:2]], ArrowConfig(top_k=1)
        )  # type: ignore[arg-type]
        theirs.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="create_arrow_model"):
        tt.Adapter.load(tmp_path / "arrow_router")
