"""``transformers.Trainer`` with models of `trimtab.peft`: as with PEFT, and where PEFT stops too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

import trimtab.peft as ours
from tests import tiny
from tests.peft.ecosystem_kit import (
    STEPS,
    Rows,
    arguments,
    close,
    files,
    filled,
    learned,
    lora,
    losses,
    same,
    train,
)  # fmt: skip
from trimtab.errors import UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


def model_of(package: Any, **options: Any) -> Any:
    model = tiny.llama(num_hidden_layers=2)
    return filled(package.get_peft_model(model, lora(package, **options)))


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": "all-linear"},
                {"modules_to_save": ["lm_head"]}]
)  # fmt: skip
def test_a_script_gives_the_losses_that_it_gives_under_peft(
    options: dict[str, Any], tmp_path: Path
) -> None:
    runs = {}
    for package in (ours, peft):
        model = tiny.llama(num_hidden_layers=2)
        model = package.get_peft_model(model, lora(package, **options))
        if "modules_to_save" not in options:
            filled(model)
        else:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_" in name:
                        p.copy_(torch.linspace(-0.1, 0.1, p.numel()).reshape(p.shape))
        runs[package.__name__] = train(model, tmp_path)
    close(losses(runs["trimtab.peft"]), losses(runs["peft"]))
    first, second = (learned(run.model) for run in runs.values())
    if "modules_to_save" not in options:
        same(first, second, atol=1e-4)


def test_the_classification_head_is_trained_beside_the_adapter(tmp_path: Path) -> None:
    runs = []
    for package in (ours, peft):
        config = package.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
        model = package.get_peft_model(tiny.bert(), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).reshape(p.shape))
        runs.append(train(model, tmp_path / package.__name__, train_dataset=Rows(classes=3)))
    close(*map(losses, runs))
    assert [run.label_names for run in runs] == [["labels"], ["labels"]]


def test_a_checkpoint_is_the_adapter_alone(tmp_path: Path) -> None:
    trainer = train(model_of(ours), tmp_path / "run", save_strategy="steps", save_steps=2)
    found = files(tmp_path / "run" / "checkpoint-2")
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= found
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & found
    trainer.save_model(str(tmp_path / "saved"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files(tmp_path / "saved")
    again = ours.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(
        tiny.llama(num_hidden_layers=2), str(tmp_path / "saved")
    )
    ids = Rows()[0]["input_ids"][None]
    expected = trainer.model.eval()(input_ids=ids).logits
    for model in (again, theirs):
        assert torch.allclose(model.eval()(input_ids=ids).logits, expected, atol=1e-6)


def prompted(kind: str, **options: Any) -> Any:
    model = tiny.llama(num_hidden_layers=2)
    cls = getattr(ours, kind)
    return ours.get_peft_model(model, cls(task_type="CAUSAL_LM", num_virtual_tokens=3, **options))


MADE = {
    "lora": lambda: model_of(ours, lora_dropout=0.1),
    "dora": lambda: model_of(ours, use_dora=True),
    "head": lambda: model_of(ours, modules_to_save=["lm_head"]),
    "prefix": lambda: prompted("PrefixTuningConfig"),
    "prompt": lambda: prompted("PromptTuningConfig"),
    "p-tuning": lambda: prompted("PromptEncoderConfig", encoder_hidden_size=8),
}


def made(kind: str) -> Any:
    torch.manual_seed(3)
    return MADE[kind]()


@pytest.mark.parametrize("kind", MADE)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(kind: str, tmp_path: Path) -> None:
    """PEFT cannot resume prompts at all: it saves less than it trains."""
    whole = train(made(kind), tmp_path, save_strategy="steps", save_steps=2)
    resumed = train(made(kind), tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
    same(learned(whole.model), learned(resumed.model))
    assert losses(resumed)[-1] == losses(whole)[-1]
    assert len(learned(whole.model)) > 0


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_the_best_checkpoint_is_the_model_at_the_end(kind: str, tmp_path: Path) -> None:
    trainer = train(
        made(kind), tmp_path, eval_dataset=Rows(), eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, learning_rate=0.5, load_best_model_at_end=True,
    )  # fmt: skip
    evals = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evals, key=lambda step: evals[step])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[best], abs=1e-6)
    assert trainer.model.active_adapters == ["default"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool, tmp_path: Path) -> None:
    """PEFT refuses it for prefixes; the older, reentrant kind needs blocks that share nothing."""
    if reentrant and kind != "lora":
        with pytest.raises(UnsupportedError, match="use_reentrant=False"):
            train(
                made(kind), tmp_path, gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": True},
            )  # fmt: skip
        return
    found = []
    for recompute in (False, True):
        model = model_of(ours) if kind == "lora" else made(kind)
        options = (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            if recompute
            else {}
        )  # fmt: skip
        found.append(learned(train(model, tmp_path, **options).model))
    same(*found, atol=1e-5)


def test_several_adapters_one_learns_and_all_are_saved_and_resumed(tmp_path: Path) -> None:
    def several() -> Any:
        model = model_of(ours)
        model.add_adapter("other", lora(ours, r=2))
        filled(model, "other")
        model.set_adapter("other")
        return model

    model = several()
    before = model.state_dict()
    frozen = {k: v.clone() for k, v in before.items() if ".default." in k}
    whole = train(model, tmp_path, save_strategy="steps", save_steps=2)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in frozen.items())
    assert {"adapter_model.safetensors", "other/adapter_model.safetensors"} <= files(
        tmp_path / "checkpoint-2"
    )
    resumed = train(several(), tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
    assert resumed.model.active_adapters == ["other"]
    same(learned(whole.model), learned(resumed.model))


def test_seq2seq_trainer_evaluates_by_generating(tmp_path: Path) -> None:
    found = []
    for package in (ours, peft):
        config = package.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"])
        model = filled(package.get_peft_model(tiny.t5(), config))
        model.generation_config.max_new_tokens = 4
        trainer = Seq2SeqTrainer(
            model=model,
            args=arguments(
                tmp_path / package.__name__, Seq2SeqTrainingArguments, predict_with_generate=True
            ),
            train_dataset=Rows(),
            eval_dataset=Rows(),
        )
        trainer.train()
        found.append((losses(trainer), trainer.predict(Rows()).predictions))
    close(found[0][0], found[1][0])
    assert (found[0][1] == found[1][1]).all()


def test_only_the_adapter_is_optimised_and_the_base_is_as_it_was(tmp_path: Path) -> None:
    model = model_of(ours)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = train(model, tmp_path, weight_decay=0.1)
    groups = trainer.optimizer.param_groups
    assert (
        sum(p.numel() for g in groups for p in g["params"])
        == model.get_nb_trainable_parameters()[0]
    )
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())
    assert len(losses(trainer)) == STEPS


def test_mixed_rows_are_evaluated_by_the_adapters_they_name(tmp_path: Path) -> None:
    """A batch may carry ``adapter_names`` through a Trainer's own ``prediction_step``."""
    model = model_of(ours)
    ids = torch.stack([Rows()[0]["input_ids"], Rows()[0]["input_ids"]])
    trainer = Trainer(model=model, args=arguments(tmp_path))
    inputs = {"input_ids": ids, "labels": ids, "adapter_names": ["default", "__base__"]}
    _, logits, _ = trainer.prediction_step(model, inputs, prediction_loss_only=False)
    with model.disable_adapter():
        assert torch.allclose(logits[1], model.eval()(input_ids=ids[1:]).logits[0], atol=1e-6)
    assert not torch.allclose(logits[0], logits[1])
