"""LoRA in ``nn.MultiheadAttention``: names, files and functions are PEFT's, but for a change that PEFT adds twice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab.peft as ours
from trimtab.errors import UnsupportedError
from trimtab.peft.changes import changes

WIDTH = 16
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Self- and cross-attention, and a torch encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        y = x + self.attn(x, x, x)[0]
        y = y + self.cross(y, x, x, need_weights=False)[0]
        return self.head(self.encoder(y))


TARGETS: list[Any] = [
    ["attn"],
    ["attn", "cross", "self_attn"],
    ["self_attn", "linear1"],
    r".*attn|cross",
]


def made(package: Any, **options: Any) -> Any:
    given = {"target_modules": TARGETS[1], "r": 4, "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.get_peft_model(Net(), package.LoraConfig(**given))


@torch.no_grad()
def without_outputs(model: nn.Module) -> None:
    """Take the change of output projections away: PEFT adds it twice."""
    for name, parameter in model.named_parameters():
        if "out_proj.lora_B" in name:
            parameter.zero_()


@pytest.mark.parametrize("targets", TARGETS)
def test_names_and_counts_are_pefts(targets: Any) -> None:
    mine, theirs = (made(package, target_modules=targets) for package in (ours, peft))
    for learns in (False, True):
        named = [
            {n: p.shape for n, p in m.named_parameters() if p.requires_grad or not learns}
            for m in (mine, theirs)
        ]
        assert named[0] == named[1]
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert set(mine.state_dict()) == set(theirs.state_dict())
    keys = [set(p.get_peft_model_state_dict(m)) for p, m in ((ours, mine), (peft, theirs))]
    assert keys[0] == keys[1]


def test_outputs_and_gradients_are_pefts() -> None:
    mine, theirs = made(ours).train(), made(peft).train()
    without_outputs(theirs)
    ours.set_peft_model_state_dict(mine, peft.get_peft_model_state_dict(theirs))
    outputs = [model(X) for model in (mine, theirs)]
    assert torch.allclose(*outputs, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in mine.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, wanted[name], atol=1e-3, rtol=1e-3), name


@torch.no_grad()
def test_merged_and_unmerged() -> None:
    model, bare = made(ours).eval(), Net().eval()
    before = model(X)
    model.merge_adapter()
    assert torch.allclose(model(X), before, atol=1e-5)
    assert {n for n, _ in model.named_parameters() if "lora_" in n}, (
        "what is trained stays in sight"
    )
    with model.disable_adapter():
        assert torch.allclose(model(X), bare(X), atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(X), before)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(X), before, atol=1e-5)
    assert list(merged.state_dict()) == list(bare.state_dict())


@torch.no_grad()
def test_its_folder_gives_what_peft_computes_and_goes_back(tmp_path: Path) -> None:
    """PEFT 0.21.2 adds the change of an output projection twice; a folder of its own means that here, too."""
    theirs = made(peft, rank_pattern={"cross": 2}, alpha_pattern={"cross": 5})
    theirs.save_pretrained(tmp_path / "theirs")
    mine = ours.PeftModel.from_pretrained(Net(), tmp_path / "theirs").eval()
    wanted = theirs(X)
    assert torch.allclose(mine(X), wanted, atol=1e-4)
    mine.save_pretrained(tmp_path / "again")
    again = ours.PeftModel.from_pretrained(Net(), tmp_path / "again").eval()
    assert torch.equal(again(X), mine(X))
    back = peft.PeftModel.from_pretrained(Net(), tmp_path / "again").train()
    assert torch.allclose(back(X), wanted, atol=1e-5)


@torch.no_grad()
def test_our_folder_is_read_by_peft(tmp_path: Path) -> None:
    mine = made(ours, rank_pattern={"cross": 2}, alpha_pattern={"cross": 5}).eval()
    without_outputs(mine)
    mine.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    fast = theirs.eval()(X)
    assert torch.allclose(theirs.train()(X), mine(X), atol=1e-5)
    assert not torch.allclose(fast, mine(X), atol=1e-3), "there, torch's encoder passes adapters by"
    assert theirs.peft_config["default"].target_modules == {"attn", "cross", "self_attn"}


@torch.no_grad()
def test_a_folder_that_does_not_say_which_peft_wrote_it_is_warned_of(tmp_path: Path) -> None:
    theirs = made(peft)
    theirs.peft_config["default"].peft_version = None
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="out_proj twice"):
        ours.PeftModel.from_pretrained(Net(), tmp_path)


@torch.no_grad()
def test_rows_with_adapters_of_their_own_and_weighted_sums() -> None:
    """PEFT refuses a mixed batch there."""
    model = made(ours).eval()
    model.add_adapter(
        "other", ours.LoraConfig(target_modules=TARGETS[1], r=2, init_lora_weights=False)
    )
    mixed = model(X, adapter_names=["other", "__base__"])
    model.set_adapter("other")
    assert torch.allclose(mixed[0], model(X)[0], atol=1e-5)
    assert torch.allclose(mixed[1], Net().eval()(X)[1], atol=1e-5)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", combination_type="cat")
    found = {c.path: c.weights for c in changes(model, ["default", "other", "sum"])}
    for path in ("attn.in_proj_weight", "attn.out_proj"):
        first, second, both = found[path]
        assert torch.allclose(both, 0.5 * first + 2.0 * second, atol=1e-5)


def test_biases_there_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="parameter of its own"):
        made(ours, bias="all")


def test_dora_there_is_not_pefts(tmp_path: Path) -> None:
    model = made(ours, use_dora=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="TRIMTAB_DORA"):
        peft.PeftModel.from_pretrained(Net(), tmp_path)
