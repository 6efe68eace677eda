"""Training, step by step in fp64, against the same optimiser on PEFT's model or on the plain model."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

import trimtab as tt
from tests import tiny as models
from tests.oracles import kit

STEPS = 20


def losses_of(model: nn.Module, parameters: Iterable[Tensor], decay: float = 0.0) -> list[float]:
    """The losses of ``STEPS`` steps of AdamW on batches that depend on the step alone."""
    optimiser = torch.optim.AdamW(list(parameters), lr=1e-2, weight_decay=decay)
    losses = []
    for step in range(STEPS):
        batch = kit.batch_of(model, seed=100 + step)
        logits = model(**batch).logits
        if logits.dim() == 3:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            loss = F.cross_entropy(logits, batch["input_ids"].sum(1) % logits.shape[1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def assert_same_course(ours: list[float], theirs: list[float]) -> None:
    assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-10)
    assert len(set(ours)) == STEPS


def test_lora_on_a_llama_follows_peft() -> None:
    options = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 9}}
    config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, **options)
    theirs = kit.peft_model(kit.llama, config).double()
    model = kit.llama()
    adapter = tt.attach(model, tt.LoRA(rank=4, alpha=8, **options), "default")
    model.double()
    pairs = kit.paired(adapter, theirs)
    kit.give(pairs)  # the first values: A as ours, B zero
    before = {key: tensor.detach().clone() for key, tensor in adapter.tensors.items()}
    ours = losses_of(model, adapter.parameters(), decay=0.1)
    assert_same_course(
        ours, losses_of(theirs, (p for p in theirs.parameters() if p.requires_grad), decay=0.1)
    )
    for key, (mine, other) in pairs.items():
        kit.assert_close(mine, other, key)
        assert not torch.equal(mine, before[key])


def test_bitfit_on_a_bert_is_fine_tuning_of_its_biases() -> None:
    plain = kit.bert().double()
    head = ("classifier.weight", "classifier.bias")
    trained = {n: p for n, p in plain.named_parameters() if n.endswith(".bias") or n in head}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    model = kit.bert()
    bare = {name: tensor.double() for name, tensor in model.state_dict().items()}
    adapter = tt.attach(model, tt.BitFit(train=("classifier",)), "default")
    model.double()
    ours = losses_of(model, adapter.parameters())
    assert_same_course(ours, losses_of(plain, trained.values()))
    found = adapter.tensors
    assert len(found) == len(trained)
    for name, parameter in trained.items():
        path, _, leaf = name.rpartition(".")
        if name in head:
            kit.assert_close(found[f"{path}.modules_to_save.{leaf}"], parameter, name)
        else:
            kit.assert_close(bare[name] + found[f"{path}.bitfit_bias"], parameter, name)
    merged = tt.merge(model, "default")
    for name, parameter in plain.named_parameters():
        kit.assert_close(merged.get_parameter(name), parameter, name)


def test_norm_tuning_is_fine_tuning_of_the_norms() -> None:
    plain = kit.bert().double()
    trained = {
        f"{name}.{own}": p
        for name, module in plain.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, p in module.named_parameters()
    }
    for parameter in plain.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained.values()))
    model = kit.bert()
    adapter = tt.attach(model, tt.Norms(), "default")
    model.double()
    with torch.no_grad():  # the same first values, not rounded to the masters' fp32
        for name, tensor in adapter.named().items():
            tensor.copy_(trained[f"{name.path}.{name.slot.rpartition('.')[2]}"])
    assert_same_course(losses_of(model, adapter.parameters()), losses_of(plain, trained.values()))


@pytest.mark.parametrize(
    ("make", "head"),
    [(kit.bert, "classifier"), (kit.llama_classifier, "score"), (kit.roberta, "classifier")],
    ids=["bert", "llama", "roberta"],
)
def test_full_training_of_a_head_is_plain_training_of_it(make: kit.Make, head: str) -> None:
    plain = make().double()
    trained = {n: p for n, p in plain.named_parameters() if n.startswith(f"{head}.")}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    model = make()
    adapter = tt.attach(model, tt.Full(targets=(head,)), "default")
    model.double()
    ours = losses_of(model, adapter.parameters(), decay=0.1)
    assert_same_course(ours, losses_of(plain, trained.values(), decay=0.1))
    for name, parameter in trained.items():
        path, _, leaf = name.rpartition(".")
        kit.assert_close(adapter.tensors[f"{path}.modules_to_save.{leaf}"], parameter, name)


def test_full_training_of_a_tied_embedding_leaves_its_twin_alone() -> None:
    """Plain training moves both; an adapter's copy belongs to one place, and the base stays as it is."""
    model = models.llama(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    adapter = tt.attach(model, tt.Full(targets=("embed_tokens",)), "default")
    losses_of(model, adapter.parameters())
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(adapter.tensors["model.embed_tokens.modules_to_save.weight"], before)


def tied_llama() -> nn.Module:
    return models.llama(tie_word_embeddings=True)


@pytest.mark.parametrize(
    "make",
    [kit.bert, kit.llama, tied_llama, models.mixtral],
    ids=["bert", "llama", "tied", "mixtral"],
)
def test_full_training_of_all_is_plain_fine_tuning(make: kit.Make) -> None:
    """Of all layers; the router of a mixture of experts is none, and stays as it is."""
    plain = make().double()
    trained = {n: p for n, p in plain.named_parameters() if not n.endswith("mlp.gate.weight")}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    model = make()
    adapter = tt.attach(model, tt.Full(targets="all"), "default")
    model.double()
    assert adapter.count == sum(parameter.numel() for parameter in trained.values())
    ours = losses_of(model, adapter.parameters(), decay=0.1)
    assert_same_course(ours, losses_of(plain, trained.values(), decay=0.1))
    merged = tt.merge(model, "default")
    for name, parameter in trained.items():
        kit.assert_close(merged.get_parameter(name), parameter, name)
