"""``pipeline`` and ``generate`` with models of `trimtab.peft`."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import pipeline

import trimtab.peft as ours
from tests import tiny
from tests.data import kit
from tests.peft.ecosystem_kit import filled, lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
TEXTS = ["the sea is deep", "a ship turns"]


def tokenizer() -> Any:
    made = kit.byte_level()
    made.padding_side = "left"
    return made


def writer(package: Any, made: Any) -> Any:
    base = tiny.llama(vocab_size=len(made), num_hidden_layers=2)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return filled(package.get_peft_model(base, lora(package))).eval()


def test_text_generation() -> None:
    made = tokenizer()
    found = []
    for package in (ours, peft):
        write = pipeline(
            "text-generation", model=writer(package, made), tokenizer=made, device="cpu"
        )
        out = write(TEXTS, max_new_tokens=6, do_sample=False, batch_size=2)
        found.append([row[0]["generated_text"] for row in out])
    assert found[0] == found[1]
    assert all(text.startswith(start) for text, start in zip(found[0], TEXTS, strict=True))


def test_text_classification() -> None:
    made = tokenizer()
    found = []
    for package in (ours, peft):
        config = package.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
        base = tiny.bert()
        base.resize_token_embeddings(len(made), mean_resizing=False)
        with torch.no_grad():
            table = base.get_input_embeddings().weight
            table.copy_(torch.linspace(-1, 1, table.numel()).reshape(table.shape))
            base.classifier.weight.copy_(torch.linspace(-1, 1, base.classifier.weight.numel()).view_as(
                base.classifier.weight))  # fmt: skip
        model = package.get_peft_model(base, config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.linspace(-0.3, 0.3, p.numel()).reshape(p.shape))
        classify = pipeline("text-classification", model=model, tokenizer=made, device="cpu")
        found.append(classify(TEXTS))
    for mine, theirs in zip(*found, strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-6)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_prompts_generate_in_a_pipeline(kind: str) -> None:
    made = tokenizer()
    base = tiny.llama(vocab_size=len(made), num_hidden_layers=2)
    config = getattr(ours, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = ours.get_peft_model(base, config).eval()
    write = pipeline("text-generation", model=model, tokenizer=made, device="cpu")
    out = write(TEXTS, max_new_tokens=4, do_sample=False, batch_size=2)
    alone = [write(text, max_new_tokens=4, do_sample=False) for text in TEXTS]
    assert [row[0]["generated_text"] for row in out] == [a[0]["generated_text"] for a in alone]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"num_beams": 2, "num_return_sequences": 2},
                {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False},
                {"num_beams": 2, "do_sample": True}]
)  # fmt: skip
def test_generate_gives_what_it_gives_under_peft(options: dict[str, Any]) -> None:
    made = tokenizer()
    inputs = made(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    found = []
    for package in (ours, peft):
        torch.manual_seed(7)
        model = writer(package, made)
        torch.manual_seed(7)
        found.append(model.generate(**inputs, max_new_tokens=6, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_each_prompt_is_answered_by_the_adapter_it_names(options: dict[str, Any]) -> None:
    made = tokenizer()
    inputs = made([TEXTS[0]] * 3, return_tensors="pt", return_token_type_ids=False)
    names = ["default", "other", "__base__"]
    found = []
    for package in (ours, peft):
        model = writer(package, made)
        model.add_adapter("other", lora(package, r=2))
        filled(model, "other").eval()
        mixed = model.generate(
            **inputs, adapter_names=names, max_new_tokens=6, do_sample=False, **options
        )
        found.append(mixed)
        if package is not ours:
            continue
        one = {key: value[:1] for key, value in inputs.items()}
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            alone = model.generate(**one, max_new_tokens=6, do_sample=False, **options)
            assert mixed[row, : alone.shape[1]].tolist() == alone[0].tolist()
    assert torch.equal(*found)
