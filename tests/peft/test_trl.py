"""TRL's trainers, with a ``peft_config`` of `trimtab.peft` and with a model of it: as with PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch

pytest.importorskip("trl")
import trl

import trimtab.peft as ours
from tests import tiny
from tests.data import kit
from tests.peft.ecosystem_kit import arguments, close, files, filled, learned, lora, losses, same
from trimtab.errors import UnsupportedError
from trimtab.peft.guest import Guest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

TEXTS = ["the sea is deep", "a ship turns", "one two three", "two lines of text"]
datasets.disable_progress_bars()


def tokenizer() -> Any:
    made = kit.byte_level(kit.PLAIN)
    made.padding_side = "left"
    return made


def base(made: Any, classifier: bool = False) -> Any:
    sizes = {"vocab_size": len(made), "num_hidden_layers": 2}
    model = tiny.llama(**sizes)
    if not classifier:
        return model
    from transformers import LlamaForSequenceClassification

    model.config.num_labels = 1
    model.config.pad_token_id = made.pad_token_id
    torch.manual_seed(0)
    return LlamaForSequenceClassification(model.config)


def text_data() -> Any:
    return datasets.Dataset.from_dict({"text": TEXTS * 2})


def preference_data() -> Any:
    n = len(TEXTS)
    return datasets.Dataset.from_dict(
        {"prompt": [t[:6] for t in TEXTS], "chosen": [t[6:] for t in TEXTS],
         "rejected": [TEXTS[(i + 1) % n][6:] for i in range(n)]}
    )  # fmt: skip


def pair_data() -> Any:
    n = len(TEXTS)
    return datasets.Dataset.from_dict(
        {"chosen": TEXTS, "rejected": [TEXTS[(i + 1) % n] for i in range(n)]}
    )


def prompt_data() -> Any:
    return datasets.Dataset.from_dict({"prompt": [t[:6] for t in TEXTS]})


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def sft(model: Any, made: Any, folder: Path, **parts: Any) -> Any:
    options = parts.pop("options", {})
    return trl.SFTTrainer(
        model=model, args=arguments(folder, trl.SFTConfig, bf16=False, **options), train_dataset=text_data(),
        processing_class=made, **parts,
    )  # fmt: skip


def dpo(model: Any, made: Any, folder: Path, **parts: Any) -> Any:
    options = parts.pop("options", {})
    return trl.DPOTrainer(
        model=model, args=arguments(folder, trl.DPOConfig, bf16=False, **options),
        train_dataset=preference_data(), processing_class=made, **parts,
    )  # fmt: skip


def reward(model: Any, made: Any, folder: Path, **parts: Any) -> Any:
    options = parts.pop("options", {})
    return trl.RewardTrainer(
        model=model, args=arguments(folder, trl.RewardConfig, bf16=False, **options), train_dataset=pair_data(),
        processing_class=made, **parts,
    )  # fmt: skip


def grpo(model: Any, made: Any, folder: Path, **parts: Any) -> Any:
    options = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "max_steps": 2}
    return trl.GRPOTrainer(
        model=model, args=arguments(folder, trl.GRPOConfig, bf16=False, **options, **parts.pop("options", {})),
        train_dataset=prompt_data(), reward_funcs=length_reward, processing_class=made, **parts,
    )  # fmt: skip


TRAINERS: dict[str, tuple[Callable[..., Any], str]] = {
    "sft": (sft, "CAUSAL_LM"),
    "dpo": (dpo, "CAUSAL_LM"),
    "grpo": (grpo, "CAUSAL_LM"),
    "reward": (reward, "SEQ_CLS"),
}


def run(kind: str, package: Any, folder: Path, by_config: bool, **options: Any) -> Any:
    """A trainer that has trained; the adapter began with values that only the names decide."""
    make, task = TRAINERS[kind]
    made = tokenizer()
    model, config = base(made, classifier=task == "SEQ_CLS"), lora(package, task_type=task)
    if by_config:
        trainer = make(model, made, folder, peft_config=config, **options)
        fill(trainer.model)
    else:
        trainer = make(fill(package.get_peft_model(model, config)), made, folder, **options)
    trainer.train()
    return trainer


def fill(model: Any) -> Any:
    """As `filled`, but a head stays as the base's."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n}
    filled(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    return model


@pytest.mark.parametrize("by_config", [True, False], ids=["peft_config", "model"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_losses_are_those_of_peft(kind: str, by_config: bool, tmp_path: Path) -> None:
    mine = run(kind, ours, tmp_path / "ours", by_config)
    theirs = run(kind, peft, tmp_path / "peft", by_config)
    close(losses(mine), losses(theirs))
    assert any(losses(mine))
    first, second = learned(mine.model), learned(theirs.model)
    lora_a = {n: p for n, p in first.items() if "lora_" in n}
    same(lora_a, {n: second[n] for n in lora_a}, atol=2e-5)
    if by_config:
        assert type(mine.model) is type(theirs.model)
        assert isinstance(mine.model.base_model, Guest)
    else:
        assert isinstance(mine.model, ours.PeftModel)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_what_a_trainer_saves_is_read_by_both(kind: str, tmp_path: Path) -> None:
    trainer = run(
        kind, ours, tmp_path, by_config=True, options={"save_strategy": "steps", "save_steps": 2}
    )
    assert "model.safetensors" not in files(tmp_path / "checkpoint-2")
    trainer.save_model(str(tmp_path / "saved"))
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "saved"))
    assert config.peft_type == "LORA" and isinstance(config, peft.LoraConfig)
    expected = logits(trainer.model)
    for package in (ours, peft):
        made = tokenizer()
        model = package.PeftModel.from_pretrained(
            base(made, classifier=kind == "reward"), str(tmp_path / "saved")
        )
        assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize("by_config", [True, False], ids=["peft_config", "model"])
def test_a_run_is_resumed(by_config: bool, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = run("sft", ours, tmp_path, by_config, options=saving)
    made = tokenizer()
    if by_config:
        again = sft(base(made), made, tmp_path / "again", peft_config=lora(ours))
    else:
        again = sft(ours.get_peft_model(base(made), lora(ours)), made, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(learned(whole.model), learned(again.model))


def test_a_model_of_pefts_around_our_tuner_does_what_its_methods_say(tmp_path: Path) -> None:
    made = tokenizer()
    bare = logits(base(made))
    model = peft.get_peft_model(base(made), lora(ours))
    filled(model)
    acting = logits(model)
    assert not torch.allclose(acting, bare)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), acting)
    model.add_adapter("ref", model.peft_config["default"])
    filled(model, "ref")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.mul_(2)
    assert torch.equal(logits(model), acting)
    model.set_adapter("ref")
    assert model.active_adapter == "ref" and not torch.allclose(logits(model), acting)
    assert {n.split(".")[-2] for n in learned(model)} == {"ref"}
    model.save_pretrained(str(tmp_path))
    assert {"adapter_model.safetensors", "ref/adapter_model.safetensors"} <= files(tmp_path)
    again = ours.PeftModel.from_pretrained(base(made), tmp_path / "ref", adapter_name="ref")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(model), acting)
    model.delete_adapter("ref")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), acting)
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"]
    trained, every = model.get_nb_trainable_parameters()
    other = peft.get_peft_model(base(made), lora(peft))
    assert (trained, every) == other.get_nb_trainable_parameters()
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), acting, atol=1e-5)
    assert type(merged) is type(base(made)) and len(list(merged.modules())) == len(
        list(base(made).modules())
    )


@pytest.mark.parametrize("trained_before", [True, False])
def test_dpo_keeps_a_copy_of_a_given_adapter_as_its_reference(
    trained_before: bool, tmp_path: Path
) -> None:
    trainer = run("dpo", ours, tmp_path, by_config=not trained_before)
    names = list(trainer.model.peft_config)
    assert names == (["default", "ref"] if trained_before else ["default"])
    if trained_before:
        made = tokenizer()
        first = filled(ours.get_peft_model(base(made), lora(ours))).state_dict()
        for name, tensor in trainer.model.state_dict().items():
            if ".ref." in name:
                assert torch.equal(tensor, first[name.replace(".ref.", ".default.")])
    assert trainer.model.active_adapter == "default"


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
@pytest.mark.parametrize("by_config", [True, False], ids=["peft_config", "model"])
def test_prompts_are_trained_switched_and_resumed(
    kind: str, by_config: bool, tmp_path: Path
) -> None:
    made = tokenizer()
    config = getattr(ours, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)

    def begin(folder: Path, **options: Any) -> Any:
        torch.manual_seed(5)
        if by_config:
            return dpo(base(made), made, folder, peft_config=config, options=options)
        model = ours.get_peft_model(base(made), config)
        return sft(model, made, folder, options=options)

    whole = begin(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    assert torch.isfinite(torch.tensor(losses(whole))).all()
    again = begin(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(learned(whole.model), learned(again.model))
    with whole.model.disable_adapter():
        assert torch.equal(logits(whole.model), logits(base(made)))
    assert not torch.allclose(logits(whole.model), logits(base(made)))
    saved = ours.PeftModel.from_pretrained(base(made), tmp_path / "checkpoint-4")
    assert torch.allclose(logits(saved), logits(whole.model), atol=1e-6)


def test_what_pefts_files_cannot_hold_is_refused_with_the_way_out() -> None:
    model = tiny.gpt2()
    before = [name for name, _ in model.named_modules()]
    prompt = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    for config, reason in (
        (ours.BottleneckConfig(size=2), "PEFT lacks this method.*get_peft_model"),
        (ours.PromptEncoderConfig(**prompt), "no place for the encoder.*get_peft_model"),
        (ours.PrefixTuningConfig(**prompt, prefix_projection=True), "no place for the encoder"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            peft.get_peft_model(model, config)
        assert [name for name, _ in model.named_modules()] == before


def test_a_given_configuration_serves_again(tmp_path: Path) -> None:
    """PEFT's classes write their heads into it; ours reads them back."""
    made = tokenizer()
    config = lora(ours, task_type="SEQ_CLS")
    counts = []
    for _ in range(2):
        model = peft.get_peft_model(base(made, classifier=True), config)
        assert any("score" in name for name in learned(model))
        assert not any("modules_to_save" in type(m).__name__ for m in model.modules())
        counts.append(model.get_nb_trainable_parameters()[0])
    theirs = peft.get_peft_model(base(made, classifier=True), lora(peft, task_type="SEQ_CLS"))
    assert counts == [theirs.get_nb_trainable_parameters()[0]] * 2


@pytest.mark.parametrize("by_config", [True, False], ids=["peft_config", "model"])
def test_a_head_trained_in_full_learns_as_with_peft(by_config: bool, tmp_path: Path) -> None:
    """TRL multiplies by ``lm_head.weight`` itself, which must be the trained one, and refuses adapters at the head."""
    made, trainers = tokenizer(), []
    for package in (ours, peft):
        model, config = base(made), lora(package, modules_to_save=["lm_head"])
        if by_config:
            trainer = sft(model, made, tmp_path, peft_config=config)
            fill(trainer.model)
        else:
            trainer = sft(fill(package.get_peft_model(model, config)), made, tmp_path)
        trainer.train()
        trainers.append(trainer)
    mine, theirs = trainers
    close(losses(mine), losses(theirs))
    first, second = learned(mine.model), learned(theirs.model)
    same(first, second, atol=2e-5)
    head = next(t for name, t in first.items() if "lm_head" in name)
    assert not torch.allclose(head, base(made).lm_head.weight)


def test_an_adapter_at_the_head_is_refused_by_trl_itself(tmp_path: Path) -> None:
    made = tokenizer()
    config = lora(ours, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        sft(base(made), made, tmp_path, peft_config=config)
